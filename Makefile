# `make demo` and `make test` need python3 >= 3.11 and nothing else: they make .venv and install what they use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Tests run in two processes; torch and BLAS would otherwise start a thread per core in each. A file's tests stay
# together (worksteal), so that what they share is made once and not waited for.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --nbmake --nbmake-timeout=300 notebooks tests

.PHONY: help demo lab check test test-all format notebooks architectures clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"llmlab needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing llmlab, with torch for the export, into $(VENV) (once; a minute or more)"
	@$(PIP) -e ".[export]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing llmlab and what the tests need into $(VENV) (once; a few minutes)"
	@$(PIP) -e ".[export,dev]"
	@touch $(VENV)/.demo $@

demo: $(VENV)/.demo  ## checkpoint -> graph -> engine -> answers, with the model that ships
	@$(BIN)/python -m llmlab.demo

lab: $(VENV)/.demo  ## open the notebooks in JupyterLab
	@$(PIP) -e ".[export,notebook]"
	@cd notebooks && ../$(BIN)/jupyter-lab

check: $(VENV)/.dev  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: check  ## what CI runs: lint, types, tests, notebooks
	@$(PYTEST)

test-all: check  ## everything, the slow and the exhaustive too (nightly)
	@$(PYTEST) -m "slow or not slow"

format: $(VENV)/.dev  ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

notebooks: $(VENV)/.dev  ## bring each notebook in line with its .py, run it and save what it shows
	@$(BIN)/jupytext --quiet --sync notebooks/[0-9]*.py
	@$(BIN)/python notebooks/save.py

architectures: $(VENV)/.dev  ## measure every model family against transformers; the README's table and `llmlab inspect --architectures` show it
	@$(BIN)/python benchmarks/architectures.py

clean:  ## remove .venv, caches and built engines
	@rm -rf $(VENV) engines notebooks/engines build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
