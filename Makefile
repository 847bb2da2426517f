# Everything happens in a virtual environment of its own; a machine with Python is all it takes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: reproduce reproduce-full test nightly nightly-tests processors oldest lint site dist bench bench-smoke trust clean

## Install, then TRM-ML and its peers on drawn VOC scenes: table, picture and heads in runs/voc
reproduce: $(VENV)/.pipeline
	$(BIN)/python examples/reproduce_voc.py --jobs 2

## The whole study: every share from 10 % to 90 % and single positives, three seeds, ablations; some hours on two cores.
## Started again after an interruption it goes on where it was
reproduce-full: $(VENV)/.pipeline
	$(BIN)/python examples/reproduce_voc.py --known 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 single --seeds 1 2 3 \
		--ablation --ablation-known 0.1 single --jobs 2 --resume --output runs/voc-full

## Install, then every test with coverage of trm_losses, on all cores; some 12 minutes on two
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --cov --cov-report=term

## The long runs that the quick suite leaves out, the suite under what stands for other processors, and with the oldest dependencies
nightly: nightly-tests processors oldest

nightly-tests: $(VENV)/.dev
	$(BIN)/python -m pytest -m nightly

processors: $(VENV)/.dev
	$(BIN)/python tests/processors.py

## Every test with the oldest version of each dependency that setup.cfg allows, torch among them, and Python 3.10 if it is there;
## some 3 GB in .venv-oldest
oldest: .venv-oldest/.dev
	.venv-oldest/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile

.venv-oldest/.dev: setup.cfg pyproject.toml
	$$(python3.10 -c "" 2>/dev/null && echo python3.10 || echo $(PYTHON)) -m venv .venv-oldest
	sed -n 's/^    \([A-Za-z0-9_-]*\)>=\([0-9.]*\).*/\1==\2/p' setup.cfg > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-oldest/oldest.txt -e ".[pipeline,tensorboard,dev]"
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

## The pages of docs/ and the reference as a site in build/site; a link that leads nowhere is an error. Nothing is fetched
site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

## Sdist and wheel in dist/, the same bytes from the same commit, and whether an index would take them
dist: $(VENV)/.dev
	$(BIN)/python -m check_manifest --no-build-isolation
	$(BIN)/python tools/make_dist.py dist
	$(BIN)/python -m twine check --strict dist/*

## Time and peak memory of the parts and of a whole step beside their usual replacements: figures and tables in runs/bench;
## some 10 minutes on two quiet cores
bench: $(VENV)/.dev
	@mkdir -p runs/bench
	$(BIN)/python benchmarks/losses.py --json runs/bench/losses.json
	$(BIN)/python benchmarks/pooling.py --rounds 5 --warmup 1 --json runs/bench/pooling.json
	$(BIN)/python benchmarks/prompts.py --json runs/bench/prompts.json
	$(BIN)/python benchmarks/step.py --json runs/bench/step.json
	$(BIN)/python benchmarks/tables.py runs/bench

## Whether the benchmarks run: each at its smallest, two rounds; the figures mean nothing
bench-smoke: $(VENV)/.dev
	$(BIN)/python benchmarks/losses.py --rounds 2 --warmup 0 --only "asymmetric loss" prototypes
	$(BIN)/python benchmarks/step.py --rounds 2 --warmup 0 --sizes tiny
	$(BIN)/python benchmarks/trust.py --only Hill --without compiled ranks

## Every part against one process in float64: precisions, compiled, over ranks, saved; the table of docs/trust.md in runs/trust
trust: $(VENV)/.dev
	$(BIN)/python benchmarks/trust.py --json runs/trust/trust.json

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.pipeline: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[pipeline]"
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[pipeline,dev]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
