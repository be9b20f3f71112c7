# Each target sets up what it needs: a virtual environment in .venv with the tested packages, made once. Needs Python 3.11 to 3.13 and pip.
VENV ?= .venv
FITS := -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	if $$python $(FITS) 2>/dev/null; then command -v $$python; break; fi; done)

BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages
TOOLS := $(VENV)/.tools
RUN := $(BIN)/python -m src.cli
# One thread each, two processes: as fast as two threads on these small tensors, and equal on any number of cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
SOURCES := src tests $(wildcard benchmarks)
DEMO := outputs/demo

.PHONY: help demo bench test test-slow test-all check format clean

help:
	@echo "make demo       text to benchmarked model on a CPU in five minutes, in $(DEMO)"
	@echo "make bench      what this machine does with the 0.5B model, and the settings that suit it"
	@echo "make test       the quick tests;  make test-all  the slow ones too"
	@echo "make check      format, lint, types;  make format  mends what it can"
	@echo "make clean      removes $(VENV), $(DEMO) and caches"

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; fi
	@$(PYTHON) $(FITS) || { echo "error: $(PYTHON) is not Python 3.11 to 3.13; name another: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@# Debian's Python has no ensurepip until python3-venv is installed; the pip that is there can fill the environment as well.
	if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	else $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; fi

$(PACKAGES): requirements.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

$(TOOLS): $(PACKAGES)
	$(BIN)/python -m pip install -r requirements.txt -e '.[dev]'
	@touch $@

# The sizes are for two cores; threads that wait passively do not stall each other where something else is running.
demo: export OMP_NUM_THREADS ?= 2
demo: export OMP_WAIT_POLICY ?= PASSIVE
demo: $(PACKAGES)
	@echo "Everything goes to $(DEMO); what an earlier demo left there is removed first."
	rm -rf $(DEMO)
	$(RUN) prepare --config configs/demo.yaml --tokenizer_out $(DEMO)/tokenizer
	$(RUN) pretrain --config configs/demo.yaml --tokenizer $(DEMO)/tokenizer/tokenizer.model
	$(RUN) longft --ckpt_in $(DEMO)/pretrain/final.pth --out_dir $(DEMO)/longft --seq_len 1024 --batch_size 2 --tokens 32_768 --lr 1e-4 --needles 1
	$(RUN) export_hf --ckpt $(DEMO)/longft/final.pth --out_dir $(DEMO)/hf_export
	$(RUN) eval --model_path $(DEMO)/hf_export --tasks configs/tasks_demo.txt --data_dir examples/benchmarks --limit 0
	$(RUN) contamination --ckpt $(DEMO)/longft/final.pth --tasks configs/tasks_demo.txt --data_dir examples/benchmarks
	$(RUN) report --runs $(DEMO)/pretrain,$(DEMO)/longft --evals $(DEMO)/hf_export/eval --out_dir $(DEMO)/report --name demo
	$(RUN) generate --model $(DEMO)/hf_export --prompt "ROMEO:" --max_new_tokens 100
	@cat examples/after_the_demo.txt

bench: $(PACKAGES)
	$(RUN) bench --config configs/model_0p5b.yaml

test: $(TOOLS)
	$(PYTEST) -m "not slow"

test-slow: $(TOOLS)
	$(PYTEST) -m slow

test-all: test test-slow

check: $(TOOLS)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

format: $(TOOLS)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean:
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
