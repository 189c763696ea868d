# Everything runs in .venv, which each target makes by itself when it is missing or
# older than setup.py or constraints.txt.

# The first interpreter that really runs (a version manager's shim may exist and fail),
# is in range, and can make a virtual environment.
USABLE := import ensurepip, ssl, sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c '$(USABLE)' >/dev/null 2>&1 && echo $$p && break; done)

define CHECK_PYTHON
@$(or $(PYTHON),false) -c '$(USABLE)' || { \
	echo "No usable Python. mpt_jax needs Python 3.11, 3.12 or 3.13 with venv" >&2; \
	echo "(Debian, Ubuntu: apt-get install python3-venv). Name another one with" >&2; \
	echo "  make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
endef

ARGS ?=
WORKDIR ?= runs/tiny
PYTEST_ARGS ?=
WORKERS ?= 2
UV_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help train test test-slow lint format constraints clean
.DEFAULT_GOAL := help

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

train: $(READY)  ## train a small MPT on this CPU; ARGS="--config.steps=100", WORKDIR=...
	$(BIN)/python -m mpt_jax.train --config configs/tiny.py --workdir $(WORKDIR) $(ARGS)

test: $(READY)  ## run the default tests; PYTEST_ARGS="tests/models -k alibi", WORKERS=0
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(READY)  ## run the tests marked slow
	$(BIN)/python -m pytest -n $(WORKERS) -m slow $(PYTEST_ARGS)

lint: $(READY)  ## check style, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## fix style in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints:  ## update constraints.txt after setup.py; UV_ARGS=--upgrade
	$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear .cache/uv
	.cache/uv/bin/python -m pip install --quiet uv
	.cache/uv/bin/uv pip compile setup.py --all-extras --universal --quiet \
		--python-version 3.11 --no-annotate --custom-compile-command "make constraints" \
		$(UV_ARGS) --output-file constraints.txt

clean:  ## delete .venv and caches; runs/ is kept
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# editdistance: only its source is on the registry for Python 3.13, and a bare machine has
# no compiler.
$(READY): setup.py constraints.txt
	$(CHECK_PYTHON)
	@echo "Installing into $(VENV) with $(PYTHON), once: downloads about 1 GB,"
	@echo "fills 3.5 GB and prints nothing for a few minutes ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt ./launch/editdistance -e '.[dev]'
	@touch $@
