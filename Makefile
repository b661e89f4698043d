# Needs a Python of at least 3.11 and pip, nothing else; all the rest goes into .venv.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
PIP := $(BIN)/python $(INSTALL)
TORCH := $(shell grep '^torch==' constraints.txt)
WHEEL_VENV := build/wheel

.PHONY: venv demo test docs lint bench dist demo-wheel clean

venv: $(VENV)/.installed-test

demo: venv
	$(BIN)/python docs/tutorials/demo.py

test: venv
	$(BIN)/python -m pytest -n auto --maxprocesses 4

docs: venv $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: venv
	$(BIN)/python benchmarks/fit.py

# sdist and wheel, and nothing else, in dist/.
dist: venv
	rm -rf dist
	$(PIP) build
	$(BIN)/python -m build

# The demo as somebody runs it who has the wheel and no clone.
demo-wheel: dist
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python $(INSTALL) $(TORCH)
	$(WHEEL_VENV)/bin/python $(INSTALL) dist/*.whl igraph
	cp docs/tutorials/demo.py $(WHEEL_VENV)
	cd $(WHEEL_VENV) && bin/python demo.py

clean:
	rm -rf $(VENV) build dist demo docs/_build .pytest_cache .ruff_cache

# torch goes first and by itself: pip then prefers a CPU build where one is at hand (2.13.0+cpu sorts above 2.13.0).
$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found as python3.11 or python3. Name one: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[$*]'
	@touch $@
