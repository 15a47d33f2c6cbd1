# Two commands on a fresh machine: `make train` and `make test`. Each target first makes the environment in .venv, if it
# is missing or if pyproject.toml or constraints.txt changed. Settings: PYTHON (interpreter), WORKERS (test processes),
# PYTEST_ARGS, TRAIN_ARGS.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What is installed: the package alone is enough to train; tests, lint and notebooks want the development extra.
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
# The tests' other implementation, torch and transformers, has an environment of its own: .venv-oracle, Python 3.11.

WORKERS ?= 2
PYTEST_ARGS ?=
TRAIN_ARGS ?=

.PHONY: help setup oracle train test lint types notebooks

help:
	@echo "make train      train the small default model on real text, with plots and a sample, in runs/tiny"
	@echo "make test       run the tests"
	@echo "make setup      make the environment with everything for development"
	@echo "make oracle     make the environment of the tests against torch and transformers (make test tries to)"
	@echo "make lint       ruff"
	@echo "make types      pyright"
	@echo "make notebooks  run every notebook"

setup: $(DEV)

# Huge pages for malloc, where glibc can: about a fifth less time a step on a CPU (LOG.md).
train: $(BASE)
	GLIBC_TUNABLES=$${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} $(BIN)/dsv3 train tiny --out runs/tiny $(TRAIN_ARGS)

oracle:
	@sh .ci/make-oracle

test: $(DEV)
	@sh .ci/make-oracle --try
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check .

types: $(DEV)
	$(BIN)/pyright

notebooks: $(DEV)
	$(BIN)/jupyter-execute --timeout=900 notebooks/*.ipynb

$(BIN)/python:
	@python=$$(sh .ci/find-python) || exit 2; \
	echo "making $(VENV) with $$python"; \
	"$$python" -m venv --clear $(VENV)

$(BASE): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $(BASE) $@
