# make run    benchmark of the embedded model: table, plots and pictures in results/
# make test   the whole test suite
# make test-oldest   the same with the oldest supported transformers, in .venv-oldest
# make test-newest   the same with the newest releases of everything, in .venv-newest
# make check-newest   a minute of it with the newest transformers alone; the result is one line
# make soak   property tests with thousands of cases, and tests that take minutes to hours
# make coverage   the test suite, and which lines it does not reach
# make lint   ruff, mypy, and who may import whom
# make audit   known vulnerabilities of everything installed
# make docs   the documentation, in site/
# make lock   renew constraints.txt: the releases that all of these install, the last two tests apart
# PYTHON=python3.12 make ...   another interpreter (3.10 or newer)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process for each core, at most eight: each loads torch.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
OLDEST := 5.5
OVERLAY := .overlay-newest

.DEFAULT_GOAL := help
.PHONY: help run test test-fast test-oldest test-newest check-newest soak coverage lint audit docs \
	format lock clean

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

# Debian splits ensurepip off: without it there would be an environment without pip.
%/bin/python:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "There is no $(PYTHON). Python 3.10 or newer is needed: PYTHON=... make ..."; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON) is too old: Python 3.10 or newer is needed (PYTHON=... make ...)")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) lacks venv or ensurepip; Debian and Ubuntu: apt-get install python3-venv"; exit 1; } >&2
	@echo "Creating $* ..."
	@$(PYTHON) -m venv $* || { rm -f $@; echo "$(PYTHON) cannot create $*; see above"; exit 1; } >&2

# A stamp for each set of extras: nothing is installed again until what it depends on changes.
$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the package and its dependencies (PyTorch is large: this may take minutes) ..."
	@sh .ci/install $(VENV) -c constraints.txt -e '.[bench]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the package with everything its tests need (may take minutes) ..."
	@sh .ci/install $(VENV) -c constraints.txt -e '.[all,dev]'
	@touch $@ $(VENV)/.run

run: $(VENV)/.run
	@$(BIN)/vtc bench

# "vtc version" ends in a sentence where torch or transformers cannot be imported.
test: $(VENV)/.dev
	@$(BIN)/vtc version
	@$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(VENV)/.dev
	@$(BIN)/vtc version
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

soak: $(VENV)/.dev
	@$(BIN)/python -m pytest $(PARALLEL) --soak

coverage: $(VENV)/.dev
	@$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term

# All as constraints.txt has it, but for transformers and what comes with it.
$(VENV)-oldest/.dev: pyproject.toml constraints.txt | $(VENV)-oldest/bin/python
	@echo "Installing the oldest supported transformers, $(OLDEST) (may take minutes) ..."
	@grep -Ev '^(transformers|huggingface-hub|tokenizers)==' constraints.txt \
		>$(VENV)-oldest/constraints.txt
	@sh .ci/install $(VENV)-oldest -c $(VENV)-oldest/constraints.txt -e '.[all,dev]' \
		'transformers==$(OLDEST).*'
	@touch $@

test-oldest: $(VENV)-oldest/.dev
	@$(VENV)-oldest/bin/vtc version
	@$(VENV)-oldest/bin/python -m pytest $(PARALLEL)

# No stamp: what is newest changes by the day. transformers by itself: pyproject.toml has a bound.
test-newest: $(VENV)-newest/bin/python
	@echo "Installing the newest releases of everything (may take minutes) ..."
	@sh .ci/install $(VENV)-newest --upgrade --upgrade-strategy eager -e '.[all,dev]'
	@sh .ci/install $(VENV)-newest --upgrade transformers
	@$(VENV)-newest/bin/vtc version
	@$(VENV)-newest/bin/python -m pytest $(PARALLEL)

check-newest: $(VENV)/.dev
	@sh .ci/check-newest $(VENV) $(OVERLAY)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@# import-linter follows no links and skips folders without an __init__.py: it gets a copy.
	@rm -rf build/contract && mkdir -p build/contract
	@tar -ch --exclude=assets --exclude=__pycache__ vtc | tar -x -C build/contract
	@find build/contract -type d -exec touch {}/__init__.py \;
	@cp pyproject.toml build/contract
	@cd build/contract && ../../$(BIN)/lint-imports --no-cache

audit: $(VENV)/.dev
	@$(BIN)/python -m pip_audit --local --skip-editable

docs: $(VENV)/.dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# uv alone, and not .dev: where the constraints exclude each other, nothing else can be installed.
# pip stays out: it would replace itself while it installs.
lock: $(BIN)/python
	@sh .ci/install $(VENV) -c constraints.txt uv
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --all-extras \
		--constraints constraints.in --no-emit-package pip --no-emit-index-url \
		--annotation-style line --custom-compile-command "make lock" \
		--output-file constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(OVERLAY) build dist site *.egg-info \
		.pytest_cache .ruff_cache .mypy_cache
