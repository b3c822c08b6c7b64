# Every target sets up what it needs: a virtual environment in .venv, installed under constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)
SOURCES := src tests examples benchmarks docs

.PHONY: help demo test quality style docs bench bench-merging clean

help:
	@echo "make demo     the main job, offline, with a small real ViT (under three minutes after installation)"
	@echo "make test     the whole suite"
	@echo "make quality  formatting, lint and types, as CI checks them"
	@echo "make style    formatting and lint, repaired where possible"
	@echo "make docs     the documentation site, into site/"
	@echo "make bench    cost of the loop beside the plain Trainer"
	@echo "make bench-merging   merges beside other libraries, which it installs below runs/; hours"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.developer: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,trl,examples,graphs]'
	@touch $@ $(VENV)/.user

$(VENV)/.docs: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@ $(VENV)/.user

demo: $(VENV)/.user
	$(BIN)/hf-atm demo

test: $(VENV)/.developer
	$(RUN)/python -m pytest -n 2

quality: $(VENV)/.developer
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

style: $(VENV)/.developer
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

bench: $(VENV)/.developer
	$(RUN)/python benchmarks/overhead.py

bench-merging: $(VENV)/.developer
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/merging/compare.py

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache
