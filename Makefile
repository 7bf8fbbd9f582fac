# Everything on a fresh machine with Python 3.11+ and make. `make demo` trains figure 2a, `make test` runs the tests.

PYTHON ?= python3
RUN_DIR ?= runs/fig2a
BIN := .venv/bin
# With EXTRAS=test,transformers, exported checkpoints are opened by Transformers itself, too (installs PyTorch).
EXTRAS ?= test

.PHONY: demo test test-slow lint clean

demo: .venv/core
	$(BIN)/python -m experiments.fig2a_instruction_count --preset=laptop --run_dir=$(RUN_DIR)

test: .venv/test
	$(BIN)/python -m pytest

test-slow: .venv/test
	$(BIN)/python -m pytest -n0 -m slow

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv

.venv/core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/test: .venv/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@
