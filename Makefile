# make compare   trains the residual designs side by side and writes a report
# make test      runs the tests
# make docs      builds the documentation into site/
# All set up everything they need in .venv first.

PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/compare
FLAGS ?=

.PHONY: compare test docs lint format clean

compare: .venv/installed
	$(BIN)/python launch/compare.py --workers=0 --workdir=$(WORKDIR) $(FLAGS)

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo 'built: site/index.html'

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build site *.egg-info

# Bytecode is made when it is first needed: most of it never is. But then it is
# kept: the tests start many processes.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 12) or sys.exit(f"mhc needs Python 3.12 or newer, {sys.executable} is {v.major}.{v.minor}: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: setup.py constraints.txt | $(BIN)/python
	$(PIP) -e '.[train]'
	@touch $@

.venv/dev: setup.py constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@ .venv/installed

.venv/docs: setup.py constraints.txt | $(BIN)/python
	$(PIP) -e '.[docs]'
	@touch $@
