# `make demo` and `make test` set up what they need on a machine that has Python 3.10 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format gpu-test clean

demo: $(READY)
	$(BIN)/flux-attention demo

test: $(READY)
	$(BIN)/python -m pytest -q -n auto

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On a GPU host with its own torch: `make gpu-test PYTEST="python3 -m pytest"`.
PYTEST ?= $(BIN)/python -m pytest
gpu-test:
	PYTHONPATH=src $(PYTEST) -q -m gpu

# Done again only when the dependencies change.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with the packages of constraints.txt: a minute or two, without output."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
