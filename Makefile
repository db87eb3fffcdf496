# Every target creates or reuses .venv by itself. PYTHON chooses the interpreter that creates it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format bench docs clean

help: ## Say what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

install: $(DEV) ## Install the package with its development tools

demo: $(CORE) ## Train, evaluate and listen to a small model
	$(BIN)/python -m dynavae.demo

test: $(DEV) ## Run the tests and the examples in the docstrings
	$(PYTEST)

test-slow: $(DEV) ## Run the slow tests
	$(PYTEST) -m "slow and not gpu"

lint: $(DEV) ## Check style, types and dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_wheels.py

format: $(DEV) ## Put the code into its standard form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(CORE) ## Time the engine against the plain loop, and the models on the chorales
	$(BIN)/python benchmarks/engine_speed.py
	$(BIN)/python benchmarks/zoo.py

docs: $(DOCS) ## Build the documentation into docs/_build (runs the examples: a minute or two)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --quiet --fail-on-warning --builder html docs docs/_build
	@echo "open docs/_build/index.html"

clean: ## Remove what was built, but not .venv
	rm -rf build dist docs/_build docs/_generated docs/gallery *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[music]"
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev,music]"
	@touch $(CORE) $@

$(DOCS): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[music,video,docs]"
	@touch $(CORE) $@
