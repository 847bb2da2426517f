# Everything happens in a virtual environment of its own; a machine with Python is all it takes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: reproduce test lint clean

## Install, then TRM-ML and its peers on drawn VOC scenes: table, picture and heads in runs/voc
reproduce: $(VENV)/.examples
	$(BIN)/python examples/reproduce_voc.py

## Install, then every test with coverage of trm_losses
test: $(VENV)/.dev
	$(BIN)/python -m pytest --cov --cov-report=term

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.examples: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[examples]"
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[examples,dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
