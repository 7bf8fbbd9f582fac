# Everything on a fresh machine with Python 3.11+ and make. `make demo` trains figure 2a, `make test` runs the tests.

VENV := .venv
BIN := $(VENV)/bin
# Another interpreter than that of $(VENV) recreates it: make PYTHON=python3.12 demo
ifndef PYTHON
PYTHON := $(or $(and $(wildcard $(VENV)/made),$(wildcard $(BIN)/python)),python3)
endif
RUN_DIR ?= runs/fig2a
# With EXTRAS=test,transformers, exported checkpoints are opened by Transformers itself, too (installs PyTorch).
EXTRAS ?= test
WITH_EXTRAS := $(VENV)/with-$(subst $() ,,$(EXTRAS))
# What finds out which versions of Python, JAX and the libraries break, in three minutes on two CPU cores.
VERSIONS := $(addprefix tests/,data/test_sources.py data/test_tokenizer.py models/test_decoder.py \
  models/test_generation.py models/test_llama.py models/test_lora.py models/test_weights.py runs/test_export.py \
  runs/test_finetune.py runs/test_tensorboard.py runtime/test_checkpoints.py test_collection.py test_extras.py \
  training/test_members.py experiments/test_launchers.py::test_smoke_runs_and_the_same_command_again_reads_it_back)

# What the user's shell says of other Pythons and their packages is not about this one.
unexport PYTHONHOME PYTHONPATH PYTHONSAFEPATH PIP_PREFIX PIP_PYTHON PIP_ROOT PIP_TARGET
export PIP_USER := no

.PHONY: demo test test-all test-thorough test-slow test-versions lint clean recreate

demo: $(VENV)/core
	$(BIN)/python -m experiments.fig2a_instruction_count --preset=laptop --run_dir=$(RUN_DIR)

test: $(WITH_EXTRAS)
	$(BIN)/python -m pytest

# What CI runs: everything except the slow tests, with Transformers and PEFT as references.
test-all:
	$(MAKE) lint test test-thorough EXTRAS=test,transformers

test-thorough: $(WITH_EXTRAS)
	$(BIN)/python -m pytest -m "thorough and not slow"

test-slow: $(WITH_EXTRAS)
	$(BIN)/python -m pytest -n0 -m slow

test-versions: $(WITH_EXTRAS)
	$(BIN)/python -m pytest $(VERSIONS)

lint: $(WITH_EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

# The files made, core and with-<extras> say what $(VENV) has. Each is made when its command is through, not before.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

identity = $(shell $(1) -I -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null)
ifneq ($(call identity,$(PYTHON)),$(call identity,$(BIN)/python))
$(VENV)/made: recreate
endif

$(VENV)/core: $(VENV)/made pyproject.toml
	$(INSTALL) .
	@touch $@

$(WITH_EXTRAS): $(VENV)/core
	$(INSTALL) '.[$(EXTRAS)]'
	@touch $@
