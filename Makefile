# `make demo` and `make test` need python3 >= 3.11 and nothing else: they make .venv and install what they use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-all check format notebooks clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"llmlab needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing llmlab into $(VENV) (once)"
	@$(PIP) -e ".[export]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing what the tests need into $(VENV) (once)"
	@$(PIP) -e ".[export,notebook,dev]"
	@touch $@

demo: $(VENV)/.demo  ## checkpoint -> graph -> engine -> answers, with the model that ships
	@$(BIN)/python -m llmlab.demo

check: $(VENV)/.dev  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: check  ## what CI runs: lint, types, tests, notebooks
	@$(BIN)/python -m pytest -n 2

test-all: check  ## everything, the slow and the exhaustive too (nightly)
	@$(BIN)/python -m pytest -n 2 -m "slow or not slow"

format: $(VENV)/.dev  ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove .venv, caches and built engines
	@rm -rf $(VENV) engines build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
