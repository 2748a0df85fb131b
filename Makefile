# Everything a checkout can do: `make help`. Each target sets up .venv first, once.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup sft pretrain generate test test-large test-peers test-browser bench-peers soak test-fast lint format clean

VENV := .venv
BIN = $(VENV)/bin
READY = $(VENV)/.setup
CORPUS := data/local/python-docs.jsonl

sft: RECIPE ?= recipes/sft/poems.yaml
pretrain: RECIPE ?= recipes/pretrain/python-docs.yaml
generate: RUN ?= runs/sft-poems
PROMPT ?= Complete the poem about the lighthouse in winter.

# What a user typed, as one word for the shell: a dollar sign and a quote in it stay what they are.
text = '$(subst ','\'',$(value $(1)))'
launch = $(if $(filter-out 0 1,$(GPUS)),$(BIN)/accelerate launch --multi_gpu --num_processes $(call text,GPUS) -m hf_clm,$(BIN)/hf-clm)
train = $(launch) train $(call text,RECIPE) --overwrite done $(if $(RUN),--output_dir $(call text,RUN)) $(ARGS)
ask = $(BIN)/hf-clm generate $(call text,$(1)) --prompt $(call text,PROMPT)
# A recipe or a folder of the user's own answers only where RUN names the folder.
POEMS := runs/sft-poems
answers = $(if $(RUN),RUN,$(if $(filter-out recipes/sft/poems.yaml,$(RECIPE))$(findstring output_dir,$(ARGS)),,POEMS))

help:  ## List the targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'GPUS=2 trains on two GPUs; PYTHON=/path/to/python sets up with that Python, VENV=folder elsewhere.'
	@echo 'PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup gets the smaller CPU build of torch.'

setup: $(READY)  ## Create .venv with the tested versions of everything; the other targets do it when needed

sft: $(READY)  ## Fine-tune on instruction data and let the model answer. RECIPE=... RUN=runs/mine ARGS="--max_steps 20"
	$(train)
	$(if $(answers),$(call ask,$(answers)))

pretrain: $(READY) $(CORPUS)  ## Train a small GPT-2 from scratch on Python's documentation. RECIPE=... RUN=... ARGS="..."
	$(train)

generate: $(READY)  ## Let a trained model answer. RUN=runs/sft-poems PROMPT="..." ARGS="--max_new_tokens 64"
	$(call ask,RUN) $(ARGS)

# A worker that was ended by SIGTERM ends the tests; a new one in its place would not.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --max-worker-restart 0 --dist worksteal

test: lint  ## Format, lint, types and the tests of every promise on a CPU; 10 minutes
	$(PYTEST) --timeout 300 -m 'not gpu and not browser and not large' $(ARGS)

test-large: $(READY)  ## The tests that test leaves out: true shapes, minutes of training, more variants. ARGS="-k poems"
	$(PYTEST) --timeout 900 -m 'large and not gpu and not browser' $(ARGS)

test-peers: $(VENV)/.setup-peers  ## Compare with TRL; installs it. ARGS="-k labels"
	$(BIN)/python -m pytest -m peer $(ARGS)

test-browser: $(VENV)/.setup-browser  ## The pages of inspect, report, compare, evaluate and serve in headless Chromium; installs both. ARGS="-k phone"
	@command -v chromium >/dev/null || { \
	    root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	    { command -v apt-get && $${root:-true} $${root:+-n true}; } >/dev/null 2>&1 \
	        || { echo 'error: found no chromium; fix: install it, on Debian with sudo apt-get install chromium' >&2; exit 6; }; \
	    $$root apt-get update && $$root apt-get install -y --no-install-recommends chromium; }
	$(BIN)/python -m pytest -m browser $(ARGS)

bench-peers: $(VENV)/.setup-peers  ## Compare speed, memory and loss with the Trainer and TRL on this CPU; 45 minutes. ARGS="--quick"
	$(BIN)/python tests/benchmarks/peers.py $(ARGS)

soak: $(READY)  ## Kill runs 200 times at random, and compare each with one that was left alone; 10 minutes. KILLS=50
	HF_CLM_SOAK_KILLS=$(if $(KILLS),$(call text,KILLS),200) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/invariants/test_soak.py $(ARGS)

test-fast: $(READY)  ## The tests that take seconds. ARGS="-k labels"
	$(PYTEST) -m 'not slow and not large and not peer and not gpu and not browser' $(ARGS)

lint: $(READY)  ## Format, lint and types, checked and not changed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)  ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove caches and built corpora; runs/ and .venv stay
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist hf_clm.egg-info data/local
	find hf_clm tests data -name __pycache__ -prune -exec rm -rf {} +

$(CORPUS): data/build_corpus.py | $(READY)
	$(BIN)/python $<

# Written last, so that a set-up that was killed is done again, in a fresh .venv.
$(READY): pyproject.toml constraints.txt
	@fail() { echo "error: $$1; fix: $$2" >&2; exit 6; }; \
	version='import sys; print("%d.%d" % sys.version_info[:2])'; \
	python=$(call text,PYTHON); \
	for name in $(BIN)/python python3.13 python3.12 python3.11 python3.10 python3; do \
	    case $$("$$name" -c "$$version" 2>/dev/null) in 3.1[0-3]) python=$${python:-$$name};; esac; done; \
	[ -n "$$python" ] || fail 'found no Python 3.10 to 3.13' 'install one, or make setup PYTHON=/path/to/python3.11'; \
	found=$$("$$python" -c "$$version" 2>/dev/null) || fail "$$python is no Python that works" 'another PYTHON='; \
	case $$found in 3.1[0-3]) ;; *) \
	    fail "$$python is Python $$found; 3.10 to 3.13 are supported" 'make setup PYTHON=/path/to/python3.11';; esac; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null \
	    || fail "$$python cannot make virtual environments" "apt install python$$found-venv, or another PYTHON="; \
	[ -z "$$(ls -A $(VENV) 2>/dev/null)" ] || [ -e $(VENV)/pyvenv.cfg ] \
	    || fail '$(VENV) is in use and no virtual environment' 'another VENV='; \
	echo "Setting up $(VENV) with Python $$found; where nothing is cached, torch is a download of gigabytes"; \
	if [ -e $(VENV)/.unfinished ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1 \
	    || [ "$$($(BIN)/python -c "$$version")" != "$$found" ]; then \
	    "$$python" -m venv --clear $(VENV); fi; \
	touch $(VENV)/.unfinished; \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	rm $(VENV)/.unfinished; touch $@

$(VENV)/.setup-peers: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,peers]'
	touch $@

$(VENV)/.setup-browser: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt playwright
	touch $@
