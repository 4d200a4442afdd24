# make run    benchmark of the embedded model: table, plots and pictures in results/
# make test   the whole test suite
# make test-oldest   the same with the oldest supported transformers, in .venv-oldest
# make soak   property tests with thousands of cases, and tests that take minutes to hours
# make coverage   the test suite, and which lines it does not reach
# make lint   ruff and mypy
# make audit   known vulnerabilities of everything installed
# make docs   the documentation, in site/
# PYTHON=python3.12 make ...   another interpreter (3.10 or newer)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process for each core, at most eight: each loads torch.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
OLDEST := 5.5

.DEFAULT_GOAL := help
.PHONY: help run test test-fast test-oldest soak coverage lint audit docs format clean

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

# A stamp for each set of extras: nothing is installed again until pyproject.toml changes.
$(VENV)/.run: pyproject.toml | $(BIN)/python
	@echo "Installing the package and its dependencies (PyTorch is large: this may take minutes) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[bench]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing the package with everything its tests need (may take minutes) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[all,dev]'
	@touch $@ $(VENV)/.run

run: $(VENV)/.run
	@$(BIN)/vtc bench

test: $(VENV)/.dev
	@$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(VENV)/.dev
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

soak: $(VENV)/.dev
	@$(BIN)/python -m pytest $(PARALLEL) --soak

coverage: $(VENV)/.dev
	@$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term

$(VENV)-oldest/.dev: pyproject.toml
	@$(PYTHON) -m venv $(VENV)-oldest
	@echo "Installing the oldest supported transformers, $(OLDEST) ..."
	@$(VENV)-oldest/bin/python -m pip install -qq --disable-pip-version-check -e '.[all,dev]' \
		'transformers==$(OLDEST).*'
	@touch $@

test-oldest: $(VENV)-oldest/.dev
	@$(VENV)-oldest/bin/python -m pytest $(PARALLEL)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

audit: $(VENV)/.dev
	@$(BIN)/python -m pip_audit --local --skip-editable

docs: $(VENV)/.dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
