PYTHON ?= python3
TORCH := torch==2.13.0
# Both ends of what is supported. PyTorch's wheels with CUDA ask for a version of their own, hence
# --no-deps below.
TRITON := triton==3.9.0
OLD_TRITON := triton==3.6.0
# What PyTorch 2.12 and 2.13 install with CUDA.
CUDA_TRITON := triton==3.7.1
VENV := .venv
SHARED_VENV := .venv-shared
OLD_VENV := .venv-triton36
CUDA_VENV := .venv-triton371
HF_VENV := .venv-hf
VERL_VENV := .venv-verl
MEGATRON_VENV := .venv-megatron
TRAINERS_VENV := .venv-trainers
OLDEST_VENV := .venv-oldest
BIN := $(VENV)/bin
ENVIRONMENTS := $(addsuffix /.stamp,$(VENV) $(OLD_VENV) $(CUDA_VENV) $(HF_VENV) $(VERL_VENV) \
	$(MEGATRON_VENV) $(TRAINERS_VENV))
NUMERIC := tests/test_advantages.py tests/test_api.py tests/test_cpu.py tests/test_log_probs.py \
	tests/test_options.py tests/test_policy_losses.py tests/test_testing.py
# What the Triton between the two ends is held to: every kernel, option, dtype and way to load once.
IN_BETWEEN := tests/interpreter/test_kernels.py::test_triton_matches_float64 \
	tests/interpreter/test_kernels.py::test_triton_by_descriptors_matches_pointers \
	tests/interpreter/test_options.py::test_triton_option_matches_float64
# Bytecode of what is never imported takes half of the time of an installation.
PIP_FLAGS := -q --disable-pip-version-check --no-compile
# What is imported is compiled once, wherever this is set, instead of by each of hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
# The environment of a target. It sees PyTorch, Triton and pip, which are installed once, behind its
# own, and has their interpreter, whatever PYTHON is by now.
define environment
	$(SHARED_VENV)/bin/python -m venv --without-pip $(@D)
	$(SHARED_VENV)/bin/python $(PURELIB) > "$$($(@D)/bin/python $(PURELIB))/shared.pth"
endef

.DEFAULT_GOAL := help
.PHONY: help dev environments fmt lint type check docs docs-tables docs-figures build clean hub \
	test test-levels test-hf test-verl test-megatron test-trainers test-oldest \
	bench bench-small bench-shapes bench-full bench-micro bench-peers gpu gpu-tune

help: ## print the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) $(TORCH)
	$(BIN)/python -m pip install $(PIP_FLAGS) $(TORCH) -e '.[dev]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps $(TRITON)
	touch $@

$(SHARED_VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(SHARED_VENV)
	$(SHARED_VENV)/bin/python -m pip install $(PIP_FLAGS) $(TORCH)
	$(SHARED_VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps $(TRITON)
	touch $@

# The oldest Triton needs an older numpy in its interpreter.
$(OLD_VENV)/.stamp: pyproject.toml $(SHARED_VENV)/.stamp
	$(environment)
	$(OLD_VENV)/bin/python -m pip install $(PIP_FLAGS) 'numpy<2.4' pytest pytest-xdist hypothesis
	$(OLD_VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps $(OLD_TRITON)
	touch $@

$(CUDA_VENV)/.stamp: pyproject.toml $(SHARED_VENV)/.stamp
	$(environment)
	$(CUDA_VENV)/bin/python -m pip install $(PIP_FLAGS) numpy networkx pytest pytest-xdist hypothesis
	$(CUDA_VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps $(CUDA_TRITON)
	touch $@

# These two change every few weeks, and what they change decides about models: a new version is
# taken on purpose.
$(HF_VENV)/.stamp: pyproject.toml $(SHARED_VENV)/.stamp
	$(environment)
	$(HF_VENV)/bin/python -m pip install $(PIP_FLAGS) $(TORCH) -e '.[hf,trl]' \
		'transformers==5.24.*' 'trl==1.16.*' \
		accelerate matplotlib peft prefix-grouper pytest pytest-xdist hypothesis
	touch $@

# verl lists what all its engines and rollouts need: this is what its FSDP engine imports.
$(VERL_VENV)/.stamp: pyproject.toml $(SHARED_VENV)/.stamp
	$(environment)
	$(VERL_VENV)/bin/python -m pip install $(PIP_FLAGS) $(TORCH) -e . 'transformers==5.10.*' \
		'tensordict<=0.10' accelerate codetiming datasets dill omegaconf peft pillow ray \
		pytest hypothesis
	$(VERL_VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps verl==0.9.1
	touch $@

$(MEGATRON_VENV)/.stamp: pyproject.toml $(SHARED_VENV)/.stamp
	$(environment)
	$(MEGATRON_VENV)/bin/python -m pip install $(PIP_FLAGS) $(TORCH) megatron-core==0.16.1 einops \
		numpy pytest hypothesis
	touch $@

# They ask for other versions of transformers, and import with this one.
$(TRAINERS_VENV)/.stamp: pyproject.toml $(SHARED_VENV)/.stamp
	$(environment)
	$(TRAINERS_VENV)/bin/python -m pip install $(PIP_FLAGS) $(TORCH) 'transformers==5.24.*' \
		kernels==0.17.2 accelerate addict datasets einops jaxtyping loguru numpy peft pillow \
		psutil pytest hypothesis spmd_types==0.2.3 tensorboard torchdata tyro \
		'trl==1.16.*' matplotlib prefix-grouper \
		hjson msgpack ninja py-cpuinfo pydantic 'setuptools<81' wheel
	$(TRAINERS_VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps \
		areal==1.0.4 axolotl==0.19.0 openrlhf==0.11.2 skyrl==0.3.0 torchtitan==0.3.0
	DS_BUILD_OPS=0 $(TRAINERS_VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps \
		--no-build-isolation deepspeed==0.19.8
	touch $@

# All that pyproject.toml asks for, at the oldest versions that it takes.
$(OLDEST_VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install $(PIP_FLAGS) torch==2.11.0
	$(OLDEST_VENV)/bin/python -m pip install $(PIP_FLAGS) torch==2.11.0 -e '.[hf,trl]' \
		transformers==5.5.3 trl==1.16.0 'numpy<2.4' accelerate peft pytest pytest-xdist hypothesis
	$(OLDEST_VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps $(OLD_TRITON)
	touch $@

environments: $(ENVIRONMENTS) ## make all environments of make test
ifneq (,$(filter environments,$(MAKECMDGOALS)))
# These build the package, which writes into the checkout: one at a time.
$(HF_VENV)/.stamp: | $(VENV)/.stamp
$(VERL_VENV)/.stamp: | $(HF_VENV)/.stamp
endif

dev: $(VENV)/.stamp ## make .venv with everything needed (PYTHON=python3 picks the interpreter)

fmt: dev ## format, and fix what can be fixed
	-$(BIN)/ruff format .
	-$(BIN)/ruff check --fix-only --quiet .

lint: dev ## check style and format, write nothing
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .

type: dev ## check types
	$(BIN)/mypy

test: ## everything that CI runs
	$(MAKE) -j 2 lint type environments
	env -u TRITON_INTERPRET $(BIN)/python -m pytest -q -n 2 \
		--ignore=tests/interpreter --ignore=tests/integrations
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/interpreter
	TRITON_INTERPRET=1 $(OLD_VENV)/bin/python -m pytest -q -n 2 tests/interpreter
	TRITON_INTERPRET=1 $(CUDA_VENV)/bin/python -m pytest -q -n 2 $(IN_BETWEEN)
	env -u TRITON_INTERPRET $(OLD_VENV)/bin/python -m pytest -q -n 2 tests/test_machine_code.py \
		tests/test_gluon.py::test_gluon_machine_code_fits_and_does_not_spill
	env -u TRITON_INTERPRET $(CUDA_VENV)/bin/python -m pytest -q \
		tests/test_machine_code.py::test_machine_code_is_within_its_budget
	$(MAKE) test-levels test-hf
	$(MAKE) -j 2 --output-sync=target test-verl test-megatron test-trainers docs

# Each level has kernels of its own in PyTorch, with roundings of their own.
test-levels: dev ## the tests of numbers, with each set of vector instructions below the processor's
	for level in $$($(BIN)/python tests/levels.py); do \
		ATEN_CPU_CAPABILITY=$$level $(BIN)/python -m pytest -q -n 2 $(NUMERIC) || exit 1; \
	done

test-hf: $(HF_VENV)/.stamp ## transformers, TRL, PEFT and DTensor, in an environment of their own
	$(HF_VENV)/bin/python -m pytest -q -n 2 --dist worksteal tests/integrations \
		--ignore=tests/integrations/test_verl.py

test-verl: $(VERL_VENV)/.stamp ## verl, and the transformers 5.10 that it needs
	$(VERL_VENV)/bin/python -m pytest -q tests/integrations/test_verl.py \
		tests/integrations/test_verl_losses.py \
		tests/integrations/test_verl_micro_groups.py \
		tests/integrations/test_verl_sequence_parallel.py \
		tests/integrations/test_transformers_exact.py \
		tests/integrations/test_transformers_backend.py \
		tests/integrations/test_mixers.py::test_hybrid_models_match_ordinary_batches \
		tests/integrations/test_mixers.py::test_checkpointing_keeps_the_tree_of_hybrid_models

test-megatron: $(MEGATRON_VENV)/.stamp ## Megatron-core, on one rank and on two
	$(MEGATRON_VENV)/bin/python -m pytest -q tests/integrations/test_megatron.py \
		tests/integrations/test_megatron_distributed.py

test-trainers: $(TRAINERS_VENV)/.stamp ## SkyRL, OpenRLHF, AReaL, axolotl, torchtitan, DeepSpeed, the hub
	$(TRAINERS_VENV)/bin/python -m pytest -q tests/integrations/test_bench_peers.py \
		tests/integrations/test_deepspeed.py tests/integrations/test_hub.py \
		tests/integrations/test_torchtitan.py tests/integrations/test_trainers.py

test-oldest: $(OLDEST_VENV)/.stamp ## the oldest PyTorch, Triton, transformers and TRL (not in make test)
	env -u TRITON_INTERPRET $(OLDEST_VENV)/bin/python -m pytest -q -n 2 $(NUMERIC) \
		tests/test_layout.py tests/test_ops.py tests/test_schedule.py
	TRITON_INTERPRET=1 $(OLDEST_VENV)/bin/python -m pytest -q -n 2 tests/interpreter/test_options.py
	$(OLDEST_VENV)/bin/python -m pytest -q -n 2 --dist worksteal tests/integrations/test_trl.py \
		tests/integrations/test_trl_losses.py tests/integrations/test_transformers_*.py

bench: dev ## check gradients, then measure; table, CSV and picture in a few minutes
	$(BIN)/python -m bench

bench-small: dev ## the same on one small case, in seconds
	$(BIN)/python -m bench --case 256,64,4,4,2,64 --rounds 3

bench-full: dev ## measure the whole table
	$(BIN)/python -m bench --full

bench-shapes: dev ## measure windows, softcaps, sinks, bfloat16, trees and small groups on a CPU
	$(BIN)/python -m bench.shapes

bench-peers: $(TRAINERS_VENV)/.stamp ## measure TRL's, AReaL's and Prefix Grouper's attention beside ours, on a CPU
	TRITON_INTERPRET=1 $(TRAINERS_VENV)/bin/python -m bench.peers

bench-micro: $(HF_VENV)/.stamp ## measure memory and time of micro-groups, in half an hour
	$(HF_VENV)/bin/python -m bench --micro

gpu: ## check and time on a GPU in nine minutes, with what PYTHON has installed (OUT=folder)
	@$(PYTHON) -c 'import torch' || { echo 'make gpu needs a PYTHON with PyTorch and Triton'; exit 2; }
	$(PYTHON) -m bench.gpu $(if $(OUT),--out "$(OUT)")

gpu-tune: ## time tiles on a GPU: KERNEL=forward or backward (CASE=P,S,G,Hq,Hkv,D OUT=folder)
	$(PYTHON) -m bench.gpu --kernel "$(KERNEL)" $(if $(CASE),--case "$(CASE)") $(if $(OUT),--out "$(OUT)")

docs-tables: dev ## rewrite the tables of the docs that come from the code
	$(BIN)/python -m bench.publish

docs-figures: dev ## draw the pictures of the docs from masks, schedules and results
	$(BIN)/python docs/figures.py

docs: dev ## build the documentation, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict -f docs/mkdocs.yml

hub: dev ## write the kernel for the Hugging Face hub to out/hub
	$(BIN)/python -m hub

build: dev ## wheel and source distribution in dist/
	$(BIN)/python -m build

check: lint type ## the checks that take seconds

clean: ## remove what was built, the environments too
	rm -rf $(VENV) $(SHARED_VENV) $(OLD_VENV) $(CUDA_VENV) $(HF_VENV) $(VERL_VENV) \
		$(MEGATRON_VENV) $(TRAINERS_VENV) $(OLDEST_VENV) \
		build dist out site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
