# Everything from a fresh clone: each target installs what it needs into .venv, and says what it cannot get.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# The Python to build .venv from: `make PYTHON=/opt/python/bin/python3 test`. The first of these that is new enough.
PYTHON := python3 python3.14 python3.13 python3.12 python3.11
VENV := .venv
CONTENDERS := .venv-bench
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
ARGS :=
# Processes that share the tests. They mostly wait: two take half the time of one, and need no more than two cores.
JOBS := 2

help: ## what there is to make
	@echo "make demo    the main job on this machine: S3 -> cache -> PyTorch, in about two minutes"
	@echo "make test    check, then all tests"
	@echo "make check   ruff (lint and format) and mypy, over everything"
	@echo "make bench   the numbers: our goals, and side by side with what one would use instead"
	@echo "make micro   the hot paths one by one, against the figures of the last version"
	@echo "make clean   remove what these made, .venv included"
	@echo "ARGS=... is handed on: make demo ARGS='--images 200', make test ARGS='-k store'"

demo: $(VENV)/demo.stamp system
	@$(BIN)/python -m cachefs_sidecar.demo $(ARGS)

test: check system servers
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In an environment of its own: some contenders hold back packages that the tests need newer.
bench: system
	@$(MAKE) --no-print-directory VENV=$(CONTENDERS) $(CONTENDERS)/contenders.stamp
	@command -v s3fs >/dev/null || $(call apt_install,s3fs) || \
	  echo "cachefs: without the Debian package s3fs its contender is left out; to have it: sudo apt-get install s3fs" >&2
	$(CONTENDERS)/bin/python -m bench $(ARGS)

micro: $(VENV)/test.stamp
	$(BIN)/python -m bench.compare $(ARGS)

clean:
	rm -rf $(VENV) $(CONTENDERS) .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- the machine -------------------------------------------------------------------------------------------

# Programs of Debian packages that pip cannot bring: mounting without root, and tests' independent readers.
# Their absence stops nothing: the demonstration leaves the mount out, tests are skipped, each saying why.
system:
	@missing=""; \
	command -v fusermount3 >/dev/null || missing="$$missing fuse3"; \
	command -v rsync >/dev/null || missing="$$missing rsync"; \
	command -v fio >/dev/null || missing="$$missing fio"; \
	test -z "$$missing" || $(call apt_install,$$missing) || \
	  echo "cachefs: without the Debian packages$$missing some parts are left out; to have them: sudo apt-get install$$missing" >&2

# What tests ask who is in a cluster. Debian starts etcd when it is installed, so where there is systemd its owner decides.
servers:
	@missing=""; \
	command -v etcd >/dev/null || missing="$$missing etcd-server"; \
	compgen -G "/usr/lib/*/faketime/libfaketimeMT.so.1" >/dev/null || missing="$$missing libfaketime"; \
	command -v dnsmasq >/dev/null || test -x /usr/sbin/dnsmasq || missing="$$missing dnsmasq-base"; \
	test -z "$$missing" || { test ! -d /run/systemd/system && $(call apt_install,$$missing); } || \
	  echo "cachefs: without the Debian packages$$missing some tests are skipped; to have them: sudo apt-get install$$missing" >&2

# Installs packages when it may; false when it may not or cannot. apt's own words appear only when it fails.
define apt_install
{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && log="$$(mktemp)" && \
  { { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy --no-install-recommends install $(1); } \
    >"$$log" 2>&1 || { tail -n 5 "$$log" >&2; rm -f "$$log"; false; }; } && rm -f "$$log"; }
endef

# --- the Python environment --------------------------------------------------------------------------------

$(VENV)/created:
	@python=""; \
	for candidate in $(PYTHON); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	test -n "$$python" || { echo "cachefs: Python 3.11 or newer is missing; on Debian 12, Ubuntu 24.04 or newer: sudo apt-get install python3" >&2; exit 1; }; \
	version="$$("$$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')"; \
	"$$python" -c 'import venv, ensurepip' 2>/dev/null || $(call apt_install,"$$version-venv") || \
	  { echo "cachefs: Python's venv module is missing; to have it: sudo apt-get install $$version-venv" >&2; exit 1; }; \
	"$$python" -m venv $(VENV); \
	touch $@

# One stamp for each set of extras, made again when the project asks for something else. Sources need no reinstall.
$(VENV)/%.stamp: pyproject.toml | $(VENV)/created
	@echo "cachefs: installing what 'make $*' needs into $(VENV) (some minutes the first time)"
	@$(PIP) install --editable '.[$*]' || \
	  { echo "cachefs: pip could not install the packages above; is a package registry reachable?" >&2; exit 1; }
	@touch $@

.PHONY: help demo test check bench micro clean servers system
.SECONDARY:
