# `make demo` and `make test` set up what they need on a machine that has Python 3.10 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A pipe fails where any part of it fails.
SHELL := bash
.SHELLFLAGS := -o pipefail -c

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

# What is large is named as pip comes to it; what pip says of an error goes to standard error, unfiltered.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --root-user-action ignore --progress-bar off
STEPS := awk '/^Collecting torch|^ *Downloading .*[0-9] MB|^Building|^Installing collected/ {print "  " substr($$0, 1, 100); fflush()}'

# Done again only when the dependencies change.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV), once; a few minutes, most of them for PyTorch."
	@echo "1/3 an environment of its own in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "2/3 a new pip"
	@$(PIP) --quiet --upgrade pip
	@echo "3/3 the packages of constraints.txt"
	@$(PIP) --constraint constraints.txt --editable '.[dev]' | $(STEPS)
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
