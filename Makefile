# make demo | test | lint | bench: each sets up .venv itself, once. PYTHON=... picks the interpreter (3.11 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check
BENCH  := $(filter-out $(addprefix benchmarks/,ablation.py audits.py diff_cost.py first_sight.py harness.py rates.py rivals.py),$(wildcard benchmarks/*.py))

export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE         := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench clean

help:  ## say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

demo: $(STAMP)  ## scan the shipped fine-tunes; report in undertow-demo/
	$(BIN)/undertow demo --out undertow-demo

test: $(STAMP)  ## run the tests; ARGS="-k store" passes options to pytest
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)  ## ruff and mypy, as in CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## run every benchmark quickly; results in benchmarks/results/quick/
	@set -e; mkdir -p benchmarks/results/quick; for script in $(BENCH); do \
	  echo "== $$script"; $(BIN)/python $$script --quick --json benchmarks/results/quick/$$(basename $$script .py).json; done

clean:  ## remove what make made
	rm -rf $(VENV) undertow-demo

# Rebuilt only where the list of dependencies changed. Debian's Python without python3-venv has no ensurepip, so pip
# is then put in from outside.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Undertow needs Python 3.11 or newer, got " + sys.version.split()[0] + ". Pass PYTHON=/path/to/python3.11.")'
	@test -x $(BIN)/python && $(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(PIP) install --quiet --constraint constraints.txt torch --editable ".[dev,notebooks]"
	@touch $@
