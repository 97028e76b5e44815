# Each target does its own set-up in .venv and starts in seconds when that is done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?= -n auto --dist worksteal
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all peers bench lint format wheel clean

help:
	@echo "make demo    install, then watch PPO teach a small language model to carry (about a minute; another time: DEMO_ARGS='--output DIR')"
	@echo "make test    install, then run the tests, but those that are slow and protect what rarely breaks"
	@echo "make test-all  all tests: also learning runs, and every GPU kernel interpreted, executed on the CPU and compiled"
	@echo "make peers   install the packages that fastppo is compared with; then the tests and make bench do so"
	@echo "make bench   install, then time every op against plain PyTorch and its peers"
	@echo "make lint    check format and style       make format  fix them"
	@echo "make wheel   build dist/*.whl             make clean   remove what make made"

$(VENV)/.dependencies: constraints.txt pyproject.toml
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -q -c constraints.txt setuptools wheel pybind11 ninja torch
	@touch $@

$(VENV)/.installed: $(VENV)/.dependencies setup.py $(SOURCES)
	@echo "Building fastppo's kernels ..."
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev,data,math,plot,bleu,json-schema,control]'
	@touch $@

$(VENV)/.peers: peers.txt $(VENV)/.installed
	@$(PIP) install -q --no-deps -r peers.txt
	@$(PIP) install -q --no-deps --target $(VENV)/trl-1.8 trl==1.8.0 # the last that is tested with a PPO trainer
	@$(PIP) install -q --no-deps --target $(VENV)/torchao torchao==0.18.0 # apart: it tells every process which libraries it misses
	@touch $@

peers: $(VENV)/.peers

demo: $(VENV)/.installed
	@$(BIN)/python examples/arithmetic.py $(DEMO_ARGS)

test: $(VENV)/.installed
	@$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.installed
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.installed
	@$(BIN)/python -m fastppo.bench $(BENCH_ARGS)

lint: $(VENV)/.installed
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

format: $(VENV)/.installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

wheel: $(VENV)/.installed
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info fastppo/*.so
