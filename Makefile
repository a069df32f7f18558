# One command each: `make demo`, `make test`. PYTHON chooses the interpreter that .venv is made with, and PINS the
# versions of the libraries: `make test PINS=newest` has an environment of its own, .venv-newest.

PYTHON ?= python3
# The name of a file: requirements-tested.txt, requirements-newest.txt or requirements-oldest.txt.
PINS ?= tested
CONSTRAINTS := requirements-$(PINS).txt
VENV := $(if $(filter tested,$(PINS)),.venv,.venv-$(PINS))
BIN := $(VENV)/bin
# Written last: while it is newer than its prerequisites, nothing is installed again.
STAMP := $(VENV)/.complete
PIP := $(BIN)/python -m pip --disable-pip-version-check

$(if $(wildcard $(CONSTRAINTS)),,$(error PINS=$(PINS): there is no $(CONSTRAINTS). Choose one of $(patsubst requirements-%.txt,%,$(wildcard requirements-*.txt))))

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint types study doctor clean-demo clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo "  with PINS=newest or PINS=oldest: the same with other versions of the libraries, in .venv-newest or .venv-oldest"

venv: $(STAMP)  ## set up .venv: about 3 minutes and 6 GB, once
	@echo "$(VENV) is ready"

demo: $(STAMP)  ## real images -> pretrain -> detect, with and without it -> outputs/demo/report.html
	@$(BIN)/python tools/demo/run.py

# The checkers follow the tested versions: the types of libraries differ between their versions. mypy runs next to the
# tests, because alone it would use one core only. Its lines come last.
TYPES := $(VENV)/types.txt
CHECK := $(if $(filter tested,$(PINS)),$(BIN)/mypy,echo "types: not checked with $(PINS) versions")
test: $(if $(filter tested,$(PINS)),lint) $(STAMP)  ## lint, types and every test, in as many processes as there are cores, 4 at most
	@$(CHECK) >$(TYPES) 2>&1 & checker=$$!; trap "kill $$checker 2>/dev/null" INT TERM; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal; code=$$?; \
	wait $$checker || code=1; cat $(TYPES); exit $$code

lint: $(STAMP)  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	@$(BIN)/mypy

study: $(STAMP)  ## CrossMAE, MAE and random weights compared, planned for ten CPU hours; needs six Debian packages (docs/results.md)
	@$(BIN)/python tools/study.py; code=$$?; $(BIN)/python tools/study.py --page && exit $$code

doctor:  ## versions, devices, missing libraries, and the command that mends each
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m crossmae.doctor; else $(PYTHON) -m crossmae.doctor; fi

clean-demo:  ## remove the demo's output, its data included
	rm -rf outputs/demo

clean:  ## remove every .venv and the caches; outputs/ stays
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find crossmae det tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; name a Python of 3.10 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1), expected 3.10 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "[1/3] create $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# One call of pip: one resolution, and torch is fetched while nothing else waits for it.
$(STAMP): setup.py pyproject.toml $(CONSTRAINTS) tools/install_detectron2.py | $(BIN)/python
	@echo "[2/3] install torch and the other requirements: 2 to 3 minutes, 6 GB"
	@$(PIP) install $$([ -t 1 ] || echo -qq) --constraint $(CONSTRAINTS) --editable ".[det,data,video,export,hf,demo,dev]"
	@echo "[3/3] install detectron2: half a minute"
	@$(BIN)/python tools/install_detectron2.py
	@touch $@
