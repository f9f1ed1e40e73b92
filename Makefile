# Needs python3 (3.11 or newer) and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
# Files of tests go to a process for each core, and to four at most: some start a Ray of their own. tests/conftest.py
# puts them in order.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
STAMP := .venv/.installed

.PHONY: demo test test-all test-slow test-faults lint install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else "Tenfold needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e '.[dev]'
	@touch $(STAMP)

# A real sweep: doctrine-built candidates, the capacity pruner, NF4 QLoRA on Ray, a report.
demo: $(STAMP)
	@$(BIN)/tenfold demo

test: $(STAMP)
	@$(PYTEST) -m 'not slow and not faults and not gpu'

# What is in none of the others: each a Ray, a sweep or a cluster. To collect all files takes half a minute.
SLOW := grep -rlE 'pytest\.mark\.(slow|faults)' tests --include='test_*.py'

test-slow: $(STAMP)
	@$(PYTEST) -m '(slow or faults) and not gpu' $$($(SLOW))

test-faults: $(STAMP)
	@$(PYTEST) -m faults

test-all: $(STAMP)
	@$(PYTEST)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --threads 2

clean:
	rm -rf .venv build dist *.egg-info
