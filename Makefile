PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
OLD_VENV := .venv-triton36
BIN := $(VENV)/bin
PIP_FLAGS := -q --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help dev fmt lint type test bench bench-full docs build check clean

help: ## print the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) $(TORCH)
	$(BIN)/python -m pip install $(PIP_FLAGS) $(TORCH) -e '.[dev]'
	touch $@

# The oldest Triton that is supported; it needs an older numpy in its interpreter.
$(OLD_VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/python -m pip install $(PIP_FLAGS) $(TORCH)
	$(OLD_VENV)/bin/python -m pip install $(PIP_FLAGS) $(TORCH) triton==3.6.0 'numpy<2.4' \
		pytest pytest-xdist hypothesis
	touch $@

dev: $(VENV)/.stamp ## make .venv with everything needed (PYTHON=python3 picks the interpreter)

fmt: dev ## format, and fix what can be fixed
	-$(BIN)/ruff format .
	-$(BIN)/ruff check --fix-only --quiet .

lint: dev ## check style and format, write nothing
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .

type: dev ## check types
	$(BIN)/mypy

test: lint type $(OLD_VENV)/.stamp ## everything that CI runs
	env -u TRITON_INTERPRET $(BIN)/python -m pytest -q -n 2 --ignore=tests/interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/interpreter
	TRITON_INTERPRET=1 $(OLD_VENV)/bin/python -m pytest -q -n 2 tests/interpreter
	$(MAKE) docs

bench: dev ## check gradients, then measure; table, CSV and picture in a few minutes
	$(BIN)/python -m bench

bench-full: dev ## measure the whole table
	$(BIN)/python -m bench --full

docs: dev ## build the documentation, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict -f docs/mkdocs.yml

build: dev ## wheel and source distribution in dist/
	$(BIN)/python -m build

check: lint type ## the checks that take seconds

clean: ## remove what was built, the environments too
	rm -rf $(VENV) $(OLD_VENV) build dist out site *.egg-info .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis
