# The tasks of the project. `make help` lists them.
# Every install goes through constraints.txt: an unpinned torch pulls gigabytes of CUDA packages.

SHELL   := /bin/bash
VENV    ?= .venv
PYTHON  ?= python3
PIP     := $(VENV)/bin/pip install -qq --disable-pip-version-check -c constraints.txt
BIN     := $(VENV)/bin
RUN     ?= runs/demo
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONPATH :=
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint docs coverage lab gpu bench clean readme

help:            ## list the targets
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# ---- environments: one stamp an extra, remade when what it depends on changes ----

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Error: Python 3.11 or newer is needed, $$($(PYTHON) --version) was found. Install one and run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing the library (a minute or two)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what tests, lint and docs need"
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.installed-lab: $(VENV)/.installed-dev
	@$(PIP) -e '.[dev,notebook]'
	@touch $@

# ---- the two commands of the README ----

demo: $(VENV)/.installed  ## train a small GPT on Tiny Shakespeare and sample from it (about three minutes)
	@$(BIN)/fundamentallm data fetch tiny-shakespeare
	@$(BIN)/fundamentallm train tiny-shakespeare --preset demo -o $(RUN) --overwrite

test: $(VENV)/.installed-dev  ## run every notebook as a test, then the end-to-end tests
	@$(BIN)/python tools/run_tests.py

slow: $(VENV)/.installed-dev  ## the tests that take minutes: thirty random kills, more processes
	@$(BIN)/python -m pytest -m slow

# ---- quality ----

lint: $(VENV)/.installed-dev  ## ruff, mypy --strict, no drift, numbering, docstrings
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python tools/check.py

docs: $(VENV)/.installed-dev  ## build the site into _docs and check its links
	@$(BIN)/python tools/build_docs.py

readme: $(VENV)/.installed-dev  ## write README.md from nbs/index.ipynb
	@$(BIN)/python tools/build_docs.py --readme

coverage: $(VENV)/.installed-dev  ## branch coverage of the package over notebooks' cells and tests, at least 90%
	@$(BIN)/python tools/run_coverage.py

lab: $(VENV)/.installed-lab  ## open the course in JupyterLab
	@$(BIN)/jupyter lab nbs/00_core.ipynb

gpu:             ## every kernel test and benchmark on the GPU of this machine: needs only torch, triton and numpy
	@PYTHONPATH=$(CURDIR) PYTHONUNBUFFERED=1 $(PYTHON) tools/gpu.py

bench: $(VENV)/.installed-dev  ## speed against a plain PyTorch loop, alternating processes
	@$(BIN)/fundamentallm bench speed

clean:           ## remove what was built (not .venv, not runs)
	@rm -rf _docs _proc build dist *.egg-info .coverage .coverage.* htmlcov .mypy_cache .ruff_cache .pytest_cache .hypothesis nbs/nbdev.yml
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
