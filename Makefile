# `make help` lists the targets. Each target first creates .venv if it does not exist.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup sft sft-real pretrain generate test test-large test-peers test-real test-browser test-fake-cuda bench-peers bench-real soak test-fast lint format clean

VENV := .venv
BIN = $(VENV)/bin
READY = $(VENV)/.setup
CORPUS := data/local/python-docs.jsonl
MODEL := data/local/smollm2-135m-instruct

sft: RECIPE ?= recipes/sft/poems.yaml
sft-real: RECIPE ?= recipes/sft/smollm2.yaml
pretrain: RECIPE ?= recipes/pretrain/python-docs.yaml
generate: RUN ?= runs/sft-poems
PROMPT ?= Complete the poem about the lighthouse in winter.

# Quotes a variable for the shell as one word, with dollar signs and quotes in it.
text = '$(subst ','\'',$(value $(1)))'
launch = $(if $(filter-out 0 1,$(GPUS)),$(BIN)/accelerate launch --multi_gpu --num_processes $(call text,GPUS) -m hf_clm,$(BIN)/hf-clm)
train = $(launch) train $(call text,RECIPE) --overwrite done $(if $(RUN),--output_dir $(call text,RUN)) $(ARGS)
ask = $(BIN)/hf-clm generate $(call text,$(1)) --prompt $(call text,PROMPT)
# The folder that answers after `make sft`: RUN, or that of the default recipe. Empty if neither is known.
POEMS := runs/sft-poems
answers = $(if $(RUN),RUN,$(if $(filter-out recipes/sft/poems.yaml,$(RECIPE))$(findstring output_dir,$(ARGS)),,POEMS))

help:  ## List the targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'GPUS=2 trains on two GPUs; PYTHON=/path/to/python and VENV=folder choose the Python and the folder of the set-up.'
	@echo 'PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup installs the smaller CPU build of torch.'

setup: $(READY)  ## Create .venv with the tested versions of all packages (other targets do this when needed)

sft: $(READY)  ## Fine-tune on instruction data and generate an answer. RECIPE=... RUN=runs/mine ARGS="--max_steps 20"
	$(train)
	$(if $(answers),$(call ask,$(answers)))

sft-real: $(READY) $(MODEL)  ## Fine-tune SmolLM2-135M-Instruct with LoRA on a CPU and print answers before and after; 8 minutes
	$(train) --model.name_or_path $(MODEL)

pretrain: $(READY) $(CORPUS)  ## Train a small GPT-2 from scratch on Python's documentation. RECIPE=... RUN=... ARGS="..."
	$(train)

generate: $(READY)  ## Generate an answer with a trained model. RUN=runs/sft-poems PROMPT="..." ARGS="--max_new_tokens 64"
	$(call ask,RUN) $(ARGS)

# A worker that is stopped by SIGTERM must end the tests rather than be restarted.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --max-worker-restart 0 --dist worksteal

test: lint  ## Check format, lint and types, and run the tests on a CPU; 10 minutes
	$(PYTEST) --timeout 300 -m 'not gpu and not fake_cuda and not browser and not large and not real' $(ARGS)

test-large: $(READY)  ## Run the large tests: real model sizes, minutes of training, more variants. ARGS="-k poems"
	$(PYTEST) --timeout 900 -m 'large and not gpu and not fake_cuda and not browser and not real' $(ARGS)

test-peers: $(VENV)/.setup-peers  ## Run the tests that compare with TRL and llama.cpp (installs both). ARGS="-k labels"
	$(BIN)/python -m pytest -m peer $(ARGS)

test-real: $(VENV)/.setup-real $(MODEL)  ## Run the tests on SmolLM2 and of QLoRA on a CPU (fetches the model); 15 minutes. ARGS="-k resume"
	$(BIN)/python -m pytest -m real $(ARGS)

test-browser: $(VENV)/.setup-browser  ## Test all HTML pages in headless Chromium (installs it and Playwright). ARGS="-k phone"
	@command -v chromium >/dev/null || { \
	    root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	    { command -v apt-get && $${root:-true} $${root:+-n true}; } >/dev/null 2>&1 \
	        || { echo 'error: chromium is not installed; fix: install it, on Debian with sudo apt-get install chromium' >&2; exit 6; }; \
	    $$root apt-get update && $$root apt-get install -y --no-install-recommends chromium; }
	$(BIN)/python -m pytest -m browser $(ARGS)

test-fake-cuda: $(VENV)-fake-cuda/.setup  ## Run training steps on fake CUDA tensors, without a GPU (fetches torch, 530 MB); 2 minutes
	OMP_NUM_THREADS=1 $(VENV)-fake-cuda/bin/python -m pytest -m fake_cuda tests/fake_cuda $(ARGS)

bench-peers: $(VENV)/.setup-peers  ## Compare speed, memory and loss with the plain Trainer and TRL on this CPU; 45 minutes. ARGS="--quick"
	$(BIN)/python tests/benchmarks/peers.py $(ARGS)

bench-real: $(VENV)/.setup-peers $(MODEL)  ## The same on SmolLM2-135M and real records (fetches the model); 30 minutes. ARGS="--quick"
	$(BIN)/python tests/benchmarks/real.py $(ARGS)

soak: $(READY)  ## Kill runs at 200 random times, and compare each with an uninterrupted run; 10 minutes. KILLS=50
	HF_CLM_SOAK_KILLS=$(if $(KILLS),$(call text,KILLS),200) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/invariants/test_soak.py $(ARGS)

test-fast: $(READY)  ## Run the fast tests only. ARGS="-k labels"
	$(PYTEST) -m 'not slow and not large and not peer and not gpu and not fake_cuda and not browser and not real' $(ARGS)

lint: $(READY)  ## Check format, lint and types without changing files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)  ## Fix lint errors and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove caches and built corpora; runs/ and .venv stay
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist hf_clm.egg-info data/local
	find hf_clm tests data -name __pycache__ -prune -exec rm -rf {} +

$(CORPUS): data/build_corpus.py | $(READY)
	$(BIN)/python $<

$(MODEL): | $(READY)
	$(BIN)/python data/get_smollm2.py

# Written last, so that an interrupted set-up is repeated in a new .venv.
$(READY): pyproject.toml constraints.txt
	@fail() { echo "error: $$1; fix: $$2" >&2; exit 6; }; \
	version='import sys; print("%d.%d" % sys.version_info[:2])'; \
	python=$(call text,PYTHON); \
	for name in $(BIN)/python python3.13 python3.12 python3.11 python3.10 python3; do \
	    case $$("$$name" -c "$$version" 2>/dev/null) in 3.1[0-3]) python=$${python:-$$name};; esac; done; \
	[ -n "$$python" ] || fail 'no Python 3.10 to 3.13 found' 'install one, or run make setup PYTHON=/path/to/python3.11'; \
	found=$$("$$python" -c "$$version" 2>/dev/null) || fail "$$python is not a working Python interpreter" 'set PYTHON to another one'; \
	case $$found in 3.1[0-3]) ;; *) \
	    fail "$$python is Python $$found; 3.10 to 3.13 are supported" 'run make setup PYTHON=/path/to/python3.11';; esac; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null \
	    || fail "$$python cannot create virtual environments" "run apt install python$$found-venv, or set PYTHON to another one"; \
	[ -z "$$(ls -A $(VENV) 2>/dev/null)" ] || [ -e $(VENV)/pyvenv.cfg ] \
	    || fail '$(VENV) exists and is not a virtual environment' 'set VENV to another folder'; \
	echo "Setting up $(VENV) with Python $$found; unless cached, torch is a download of several gigabytes"; \
	if [ -e $(VENV)/.unfinished ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1 \
	    || [ "$$($(BIN)/python -c "$$version")" != "$$found" ]; then \
	    "$$python" -m venv --clear $(VENV); fi; \
	touch $(VENV)/.unfinished; \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	rm $(VENV)/.unfinished; touch $@

# llama.cpp is built without instructions that a virtual machine may announce but not allow.
$(VENV)/.setup-peers: $(READY)
	CMAKE_ARGS=-DGGML_NATIVE=OFF $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,peers]'
	touch $@

$(VENV)/.setup-real: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,qlora]'
	touch $@

$(VENV)/.setup-browser: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt playwright
	touch $@

$(VENV)-fake-cuda/.setup: tests/fake_cuda/setup.py | $(READY)
	$(or $(PYTHON),$(BIN)/python) $< $(VENV)-fake-cuda $(if $(TORCH_WHEEL),--torch $(call text,TORCH_WHEEL))
	touch $@
