# `make` lists the targets. Everything but Python, git and make comes from the locks.

# The interpreter that creates the virtual environment; empty: the first of python3, python3.12
# and python3.11 that is 3.11 or 3.12.
PYTHON ?=
VENV ?= .venv
PYTHON311 ?= python3.11
PYTHON312 ?= python3.12
# Test processes at a time.
WORKERS ?= 2
# E.g. PYTEST_FLAGS="-k ppo -x".
PYTEST_FLAGS ?=
# Size of the quickstarts: full or small.
PRESET ?= full

# Compiled programs outlive the process: a second start takes them from here.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.5

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-parity quickstart quickstart-vlm test test-slow test-all lint format lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
		while IFS="$$(printf '\t')" read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

setup: ## create .venv with what a run needs (nothing to do the second time)
	@PYTHON='$(PYTHON)' VENV='$(VENV)' sh tools/bootstrap.sh

setup-dev: ## the same, with linters, pytest, what notebooks need, and TFDS
	@PYTHON='$(PYTHON)' VENV='$(VENV)' sh tools/bootstrap.sh dev

setup-parity: ## setup-dev, with torch, peft, trl and pretrained weights, for the tests
	@PYTHON='$(PYTHON)' VENV='$(VENV)' sh tools/bootstrap.sh parity

quickstart: setup ## clone demonstrations, fine-tune with PPO, evaluate (PRESET=small: faster)
	$(BIN)/python -m experiments.quickstart --preset=$(PRESET)

quickstart-vlm: setup-parity ## fine-tune DINOv2 and SmolLM2 on sums of digits, evaluate (PRESET=small)
	$(BIN)/python -m experiments.quickstart_vlm --preset=$(PRESET)

test: setup-parity ## the tests that take seconds each
	$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

test-slow: setup-parity ## the tests marked slow: minutes each
	$(PYTEST) -m slow $(PYTEST_FLAGS)

# One virtual environment per version, beside .venv.
test-all: ## `make test` on Python 3.11 and on 3.12, where both are present
	@ran=; for python in '$(PYTHON311)' '$(PYTHON312)'; do \
		version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || { \
			echo "test-all: skipped: $$python does not run (set PYTHON311 or PYTHON312)"; continue; }; \
		$(MAKE) --no-print-directory test PYTHON="$$python" VENV=".venv-$$version" || exit 1; \
		ran="$$ran $$version"; \
	done; \
	[ -n "$$ran" ] || { echo "test-all: no Python to test with" >&2; exit 1; }; \
	echo "test-all: passed on Python$$ran"

lint: setup-dev ## ruff, the import tiers, and the types of public signatures
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: setup-dev ## let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# LOCK_FLAGS=--upgrade takes the newest versions that setup.py allows. The largest set comes first, so
# that the smaller one takes its versions from what they all can agree on.
COMPILE := uv pip compile --universal --python-version 3.11
lock: ## resolve setup.py into the locks, for every platform and Python (needs uv)
	mkdir -p .cache && echo 'torch ; python_version < "3"' > .cache/no-torch.txt
	$(COMPILE) --extra data --extra dev $(LOCK_FLAGS) setup.py -o requirements-dev.lock
	$(COMPILE) -c requirements-dev.lock $(LOCK_FLAGS) setup.py -o requirements.lock
	$(COMPILE) --extra parity -c requirements-dev.lock --override .cache/no-torch.txt $(LOCK_FLAGS) \
		setup.py -o requirements-parity.lock

clean: ## remove the virtual environments and every cache; runs/ stays
	rm -rf .venv .venv-3.11 .venv-3.12 .cache .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
