# genpol: `make train` and `make test` need nothing but Python 3.11 and set up .venv themselves.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
METAWORLD_VENV ?= .venv-metaworld
METAWORLD_STAMP := $(METAWORLD_VENV)/.installed
MJLAB_VENV ?= .venv-mjlab
MJLAB_STAMP := $(MJLAB_VENV)/.installed
ISAACLAB_PYTHON ?= python3.12
ISAACLAB_VENV ?= .venv-isaaclab
ISAACLAB_STAMP := $(ISAACLAB_VENV)/.installed
WORKERS ?= 2
ARGS ?=

# On few cores two test processes must not spin in wait for each other's threads.
TEST_ENV := OMP_NUM_THREADS=1 GOMP_SPINCOUNT=20000

.DEFAULT_GOAL := help
.PHONY: help train test test-slow check bench format clean metaworld test-metaworld \
	mjlab test-mjlab isaaclab test-isaaclab

help:
	@echo "make train [ARGS='agent=ppo total_steps=2e6']   train on HopperStand"
	@echo "make test  [ARGS='-k config']                   run the tests"
	@echo "make test-slow                                  run the tests that take long"
	@echo "make check | format                             lint and type check | format"
	@echo "make bench [ARGS='num_envs=1024']               measure the throughput"
	@echo "make metaworld | test-metaworld                 set up .venv-metaworld for Meta-World | test it"
	@echo "make mjlab | test-mjlab                         set up .venv-mjlab for mjlab | test it"
	@echo "make isaaclab | test-isaaclab                   set up .venv-isaaclab for Isaac Lab | test it"
	@echo "make clean                                      remove .venv* and caches, keep runs/"
	@echo "PYTHON=python3.12 make test                     with another interpreter"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[dev]'
	touch $@

# $(1): where to; $(2): the extra, whose own versions are in constraints-$(2).txt.
define own_environment
	$(PYTHON) -m venv $(1)
	awk -F== 'NR == FNR { own[$$1]; print; next } !($$1 in own)' \
		constraints-$(2).txt constraints.txt > $(1)/constraints.txt
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(1)/constraints.txt -e '.[$(2),dev]'
	touch $@
endef

# Meta-World and mjlab pin older MuJoCos; with Meta-World's the native tasks cannot do.
$(METAWORLD_STAMP): pyproject.toml constraints.txt constraints-metaworld.txt
	$(call own_environment,$(METAWORLD_VENV),metaworld)

$(MJLAB_STAMP): pyproject.toml constraints.txt constraints-mjlab.txt
	$(call own_environment,$(MJLAB_VENV),mjlab)

metaworld: $(METAWORLD_STAMP)
	@echo "Meta-World is in $(METAWORLD_VENV): $(METAWORLD_VENV)/bin/genpol train env=reach-v3 ..."

test-metaworld: $(METAWORLD_STAMP)
	$(TEST_ENV) $(METAWORLD_VENV)/bin/python -m pytest -m metaworld $(ARGS)

mjlab: $(MJLAB_STAMP)
	@echo "mjlab is in $(MJLAB_VENV): $(MJLAB_VENV)/bin/genpol train env=mjlab ..."

test-mjlab: $(MJLAB_STAMP)
	$(TEST_ENV) $(MJLAB_VENV)/bin/python -m pytest -m mjlab $(ARGS)

# Isaac Lab needs Python 3.12 and pins PyTorch. Without OMNI_KIT_ACCEPT_EULA it asks.
$(ISAACLAB_STAMP): pyproject.toml constraints.txt constraints-isaaclab.txt
	@$(ISAACLAB_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || { \
		echo "Isaac Lab needs Python 3.12, and '$(ISAACLAB_PYTHON)' is not one. Install it" \
		"(Debian: apt install python3.12-venv; else: pyenv install 3.12 && pyenv global 3.11 3.12)" \
		"or name it: make isaaclab ISAACLAB_PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(ISAACLAB_PYTHON) -m venv $(ISAACLAB_VENV)
	awk -F== 'NR == FNR { own[$$1]; print; next } !($$1 in own)' \
		constraints-isaaclab.txt constraints.txt > $(ISAACLAB_VENV)/constraints.txt
	$(ISAACLAB_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(ISAACLAB_VENV)/constraints.txt -e '.[isaaclab,dev]' || { \
		echo "Isaac Lab could not be installed; with an index of CPU builds of PyTorch:" \
		"PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make isaaclab" >&2; exit 1; }
	touch $@

isaaclab: $(ISAACLAB_STAMP)
	@echo "Isaac Lab is in $(ISAACLAB_VENV): $(ISAACLAB_VENV)/bin/genpol train env=isaaclab ..."

test-isaaclab: $(ISAACLAB_STAMP)
	$(TEST_ENV) $(ISAACLAB_VENV)/bin/python -m pytest -m isaaclab $(ARGS)

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
	rm -rf $(VENV) $(METAWORLD_VENV) $(MJLAB_VENV) $(ISAACLAB_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
