# `make test` and `make demo` do their own set-up: a .venv here, and Debian packages through apt when root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help test check clean
help:
	@echo "make test   set up, check, run all tests"
	@echo "make check  ruff (lint, format) and mypy --strict"
	@echo "make clean  remove what the other targets made"

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cachefs needs Python 3.11 or newer; $(PYTHON) is older or missing (set PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq python3-venv; else echo "missing: Debian package python3-venv"; exit 1; fi; }
	@command -v fusermount3 >/dev/null || { if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq fuse3; else echo "missing: Debian package fuse3 (mounts without root need it)"; fi; }
	@$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(BIN)/pip install -q -e '.[test]'
	@touch $@

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy cachefs sidecar/cachefs_sidecar tests

test: check
	$(BIN)/pytest

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
