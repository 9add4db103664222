# Two commands do all the set-up from a fresh clone: `make run` and `make test`.
# PIP_ARGS reaches every `pip install`, e.g. to name an index with PyTorch's CPU build.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
NATIVE := $(wildcard moescope/kernels/native/*)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: run test check conformance diagnosis bench gpu metal shots clean

run: .venv/.run
	@$(BIN)/moescope

test: .venv/.test
	$(PYTEST) -n 2

check: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -n 2

# The whole matrix of families, configs and prompts; rewrites the committed results files.
# FAMILY=gpt_oss,mixtral runs some of it.
conformance: .venv/.test
	FAMILY=$(FAMILY) $(PYTEST) -m conformance tests/oracle

# Every known fault in every family, patched into transformers and diagnosed; rewrites the committed
# results. Two hours on one core.
diagnosis: .venv/.test
	$(PYTEST) -m conformance tests/diagnosis

# Against peers on this CPU; twenty minutes on two cores that do nothing else. BENCH_ARGS reaches
# the program: --quick, --resume, --folder DIR (keeps the weights), --steps decode,lanes.
bench: .venv/.bench
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

# On a machine with a CUDA device; uses the Python it finds, installs nothing, goes on where it was
# cut short. STEPS="tests router" runs some of it; GPU_ARGS reaches the program (--list, --out DIR).
gpu:
	$(PYTHON) benchmarks/cuda_run.py $(GPU_ARGS) $(STEPS)

# On a Mac with Apple silicon: tests, parity on the hardware, and the benchmark against mlx-lm; goes on
# where it was cut short. STEPS="tests parity" runs some of it; METAL_ARGS reaches the program (--list).
metal: .venv/.metal
	$(BIN)/python benchmarks/metal_run.py $(METAL_ARGS) $(STEPS)

shots: .venv/.test
	$(BIN)/python screenshots/make.py

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt $(NATIVE)
	$(PIP) -e .
	@touch $@

.venv/.test: .venv/bin/python pyproject.toml constraints.txt $(NATIVE)
	$(PIP) -e '.[test]'
	@touch $@ .venv/.run

# A peer that does not install (llama.cpp is built from source) is left out, and the table says so.
.venv/.bench: .venv/.test
	-$(PIP) -e '.[bench]'
	@touch $@

.venv/.metal: .venv/.test
	$(PIP) mlx mlx-lm
	@touch $@
