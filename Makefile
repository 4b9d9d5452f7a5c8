# One set of commands for people and for CI. `make` alone lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
LINKS  := build/links/emoexport
STUBS  := build/stubs

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-gpu fuzz check format links clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

install: $(READY) ## .venv with the pinned versions
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
	  { echo "emoexport needs Python 3.11 or 3.12; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 3; }
	@echo "Installing the pinned versions into $(VENV) (several GB, minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[openvino,tensorrt-rtx,detect,score,serve,dev]'
	@touch $@

demo: $(READY) ## train, build and verify a small ensemble on synthetic faces
	@$(BIN)/emoexport train --data synthetic:5600 --preset tiny --out runs/demo --force
	@$(BIN)/emoexport build runs/demo -o build/demo --fp16 --int8
	@$(BIN)/emoexport verify build/demo --max-drop 1 --max-disagreement 2

test: $(READY) ## the tests, under 10 minutes on 2 cores
	@$(BIN)/python -m pytest -m 'not slow'

test-all: $(READY) ## the slow ones too, among them an hour of load (EMOEXPORT_SOAK_MINUTES=2 for less)
	@$(BIN)/python -m pytest

test-gpu: $(READY) ## those that need a CUDA device; they skip where there is none
	@NVIDIA_TF32_OVERRIDE=0 $(BIN)/python -m pytest -m gpu

fuzz: $(READY) ## search for files that readers take badly, a minute each, or SECONDS=300; needs the extra fuzz
	@$(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),60) $(TARGETS)

check: $(READY) links $(STUBS) ## format, lint, types, layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@PYTHONPATH=build/links $(BIN)/lint-imports

format: $(READY) ## put the code in order
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

links: ## the import tree as symlinks, for tools that run no import hooks
	@rm -rf $(LINKS) && mkdir -p $(LINKS)
	@ln -s $(CURDIR)/exporter/*.py $(CURDIR)/exporter/py.typed $(CURDIR)/exporter/templates $(CURDIR)/exporter/web $(LINKS)/
	@ln -s $(CURDIR)/train $(CURDIR)/engines $(CURDIR)/calib $(LINKS)/

# TensorRT's types for mypy, apart from what runs: in site-packages they would look as if TensorRT itself were there.
$(STUBS): constraints.txt | $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
	  --upgrade --target $(STUBS) tensorrt-stubs
	@# Two spellings in them are no Python.
	@sed -i.bak -e 's/\bin: list/in_: list/g' -e 's/channel_axis: int)/channel_axis: int = ...)/' \
	  $(STUBS)/tensorrt_bindings/tensorrt.pyi
	@touch $@

clean: ## remove the virtual environment and caches; runs and bundles stay
	rm -rf $(VENV) $(LINKS) $(STUBS) *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
