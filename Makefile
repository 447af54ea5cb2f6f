# `make demo` and `make test` make the environment themselves where it is missing or older than its description.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
FAST := not slow and not gpu and not slurm and not browser
CODE := saerl_cli tests experiments

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-dist test-slurm test-gpu test-browser check format wheel clean

help: ## Show the targets
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## /\1\t/' | expand -t 14

setup: $(READY) ## Make .venv with the exact versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY) ## Run the main job end to end on the planted model (minutes, no network)
	$(BIN)/saerl demo

reproduce-%: $(READY) ## Repeat an experiment and compare: make reproduce-001-demo ARGS=--dry-run
	$(BIN)/saerl reproduce $* $(ARGS)

test: check ## Check, then run the default tests
	$(TEST) -m "$(FAST)"

test-slow: $(READY) ## Run the tests that take minutes
	$(TEST) -m "slow and not gpu and not slurm and not browser"

test-dist: $(READY) ## Run the tests that start two processes
	$(BIN)/python -m pytest -m "dist and not gpu and not slurm"

test-slurm: $(READY) ## Bring up a Slurm of two nodes here, test on it, take it down
	$(BIN)/python -m pytest -m slurm tests/test_slurm.py

test-gpu: $(READY) ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-browser: $(READY) ## Run the tests that need a headless Chromium
	$(BIN)/python -m pytest -m browser

check: $(READY) ## Lint, formatting, types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/pyright

format: $(READY) ## Format and fix what can be fixed
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

wheel: $(READY) ## Build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

clean: ## Remove the environment, caches and builds; runs/ stays
	rm -rf $(VENV) .cache dist build .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
