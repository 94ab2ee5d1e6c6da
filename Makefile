# make demo | quick | test | docs | faults | check | fuzz | format | clean    (needs python3.11 or newer; make PYTHON=python3.12 … picks one)

PYTHON ?= python3
BIN := .venv/bin
# Tests run file by file on as many processes as there are cores, four at the most, each on one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help demo quick test docs faults lint check fuzz format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo     prune the bundled tiny teacher, from scoring to report"
	@echo "make quick    lint, formatting, types, fast tests: two minutes, while you work"
	@echo "make test     run the tests"
	@echo "make docs     build the documentation into site/"
	@echo "make faults   kill, fill up and damage demo runs, and compare what comes of them (a quarter of an hour)"
	@echo "make check    lint, formatting, types, tests: what has to pass before a change lands"
	@echo "make fuzz     ten minutes of configs and data that make no sense"
	@echo "make format   mend what ruff can mend"
	@echo "make clean    remove caches and builds (runs and .venv stay)"

demo: .venv/.installed
	$(BIN)/layerpeel demo

quick: .venv/.installed lint
	$(PYTEST) -x -m "not slow and not browser"

test: .venv/.installed
	$(PYTEST)

docs: .venv/.installed
	$(BIN)/python scripts/make_reference.py
	$(BIN)/python -m mkdocs build --strict

faults: .venv/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -m tests.faults --kills 100 --disks 10 --flips 50

check: .venv/.installed lint
	$(PYTEST)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: .venv/.installed
	FUZZ_SECONDS=600 $(BIN)/python -m pytest tests/test_fuzz.py

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis .venv/.installed
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# torch goes first and alone, so that pip takes the build that the machine's own settings offer
# before the packages that depend on it can ask for another.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "error: layerpeel needs Python 3.11 or newer, $(PYTHON) is %d.%d\nhint: make PYTHON=python3.12" % v[:2])'
	@echo "setting up .venv (once; takes some minutes)" >&2
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@
