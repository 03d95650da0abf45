# genpol: `make train` and `make test` need nothing but Python 3.11 and set up .venv themselves.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
ARGS ?=

# On few cores two test processes must not spin in wait for each other's threads.
TEST_ENV := OMP_NUM_THREADS=1 GOMP_SPINCOUNT=20000

.DEFAULT_GOAL := help
.PHONY: help train test test-slow check bench format clean

help:
	@echo "make train [ARGS='agent=ppo total_steps=2e6']   train on HopperStand"
	@echo "make test  [ARGS='-k config']                   run the tests"
	@echo "make test-slow                                  run the tests that take long"
	@echo "make check | format                             lint and type check | format"
	@echo "make bench [ARGS='num_envs=1024']               measure the throughput"
	@echo "make clean                                      remove .venv and caches, keep runs/"
	@echo "PYTHON=python3.12 make test                     with another interpreter"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[dev]'
	touch $@

train: $(STAMP)
	$(BIN)/genpol train env=HopperStand $(ARGS)

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-slow: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -m slow $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy genpol agents envs

bench: $(STAMP)
	$(BIN)/genpol bench env=HopperStand $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
