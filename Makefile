# The doors of this checkout.  Everything runs in .venv, which is made when it is first needed and brought up to
# date when the requirements change; no environment has to be active.
#
#   make quickstart            train on the bundled data on this machine, and write a report
#   make test                  all checks: style, types, tests
#   make lint | format         the checks of style and types alone | put files into the house's style
#   make golden                write tests/golden anew, after a change that is meant to change experiments
#   make clean                 remove the environment, caches and builds; runs/ stays
#
# ACCELERATOR=cpu (the default), cuda, cuda12 or tpu chooses the wheels of JAX; PYTHON the interpreter (>= 3.11).

PYTHON ?= python3
VENV ?= .venv
ACCELERATOR ?= cpu

BIN := $(VENV)/bin
CODE := setup.py vlpjax data_pipelines experiments tools tests
REQUIREMENTS := setup.py constraints.txt
# PIP_USER and PIP_TARGET in somebody's shell would put packages outside the environment.
INSTALL = env -u PIP_TARGET -u PIP_PREFIX PIP_USER=0 $(BIN)/python -m pip install --quiet \
	--disable-pip-version-check --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test lint format golden clean

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vlpjax needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-$(ACCELERATOR): $(REQUIREMENTS) | $(BIN)/python
	$(INSTALL) '.[$(ACCELERATOR)]'
	@touch $@

$(VENV)/.ready-dev: $(REQUIREMENTS) | $(BIN)/python
	$(INSTALL) '.[cpu,data,torch,gguf,plan,dev]'
	@touch $@ $(VENV)/.ready-cpu

quickstart: $(VENV)/.ready-$(ACCELERATOR)
	$(BIN)/python -m vlpjax.main --config=experiments/quickstart.py --workdir=runs/quickstart
	@echo "The report of the run: $(CURDIR)/runs/quickstart/report.html"

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

golden: $(VENV)/.ready-dev
	$(BIN)/python -m pytest tests/test_experiments.py -k golden --write-golden

clean:
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist vlpjax.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
