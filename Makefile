# make compare   trains the residual designs side by side and writes a report
# make test      runs the tests
# make docs      builds the documentation into site/
# All set up everything they need in .venv first. And less often:
# make versions  runs the library's tests on its oldest and newest JAX (minutes)
# make wheel     builds dist/, as for PyPI
# make audit     looks the versions of constraints.txt up for known weaknesses
# make notebooks makes the notebooks again from notebooks/src

PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/compare
FLAGS ?=
# The library runs on more versions of JAX than the trainer: tests/versions/.
VERSIONS := oldest newest

.PHONY: compare test environments docs versions notebooks lint format wheel audit clean

compare: .venv/installed
	$(BIN)/python launch/compare.py --workers=0 --workdir=$(WORKDIR) $(FLAGS)

test: environments
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What the tests run in.
environments: .venv/dev $(VERSIONS:%=.venv/versions/%/installed)

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo 'built: site/index.html'

versions: environments
	set -e; for each in $(VERSIONS); do \
	  PYTHONPATH=.venv/versions/$$each $(BIN)/python -m pytest tests/library; \
	done

notebooks: .venv/dev
	$(BIN)/python notebooks/build.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: .venv/release
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

audit: | $(BIN)/python
	$(PIP) pip-audit
	$(BIN)/python -m pip_audit --requirement constraints.txt --no-deps --disable-pip

clean:
	rm -rf .venv build dist site *.egg-info

# Environments are made side by side: each mostly waits for packages.
MAKEFLAGS += --jobs=3

# Bytecode is made when it is first needed: most of it never is. But then it is
# kept: the tests start many processes.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check

# The pip that comes with a Python takes twice as long as a newer one.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 12) or sys.exit(f"mhc needs Python 3.12 or newer, {sys.executable} is {v.major}.{v.minor}: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt --upgrade pip

.venv/installed: setup.py constraints.txt | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[train]'
	@touch $@

.venv/dev: setup.py constraints.txt | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@ .venv/installed

.venv/docs: setup.py constraints.txt | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

.venv/release: setup.py constraints.txt | .venv/dev
	$(PIP) -c constraints.txt -e '.[release]'
	@touch $@

# A folder that PYTHONPATH puts before the packages of .venv, which it shares.
.venv/versions/%/installed: tests/versions/%.txt | $(BIN)/python
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) -r $<
	@touch $@
