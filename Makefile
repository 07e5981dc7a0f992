# make demo: set up, fetch the default model, show plain decoding beside DSpark.
# make test: set up, lint, type check, all tests.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell command -v $(p)),$(p))))
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help install demo test lint clean

help:
	@echo "make install   environment in .venv, command in .venv/bin/dspark"
	@echo "make demo      install, fetch the default model, plain decoding beside DSpark"
	@echo "make test      install, ruff, pyright, all tests"
	@echo "make clean     remove .venv"

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(or $(PYTHON),false) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "dspark needs Python 3.11 or newer; name one with 'make install PYTHON=/path/to/python3'"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(STAMP)

demo: install
	$(BIN)/dspark demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf .venv
