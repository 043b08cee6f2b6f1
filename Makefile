# `make` prints what there is. Every target creates the environment it needs in .venv and says what it does.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo up down test test-triton lint protos bench eval compile-all images lock clean

# Python 3.11 or newer; override with `make demo PYTHON=/path/to/python3`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Where pip finds the torch build for this machine's hardware, for instance
# `make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu`; empty for pip's own configuration. See docs/install.md.
TORCH_INDEX ?=
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
# Errors only; what goes on is said here, a line a step.
QUIET := --quiet --quiet

help:  ## Show these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## Read a handwritten line and paint a picture, through all services, then stop them
	@$(RUN) -m services.local demo

up: $(VENV)/.installed  ## Start the OCR, diffusion and gateway services on this machine, in the background
	@$(RUN) -m services.local up

down:  ## Stop what `make up` started
	@if [ -x $(RUN) ]; then $(RUN) -m services.local down; else echo "nothing is running"; fi

test: $(VENV)/.installed-dev  ## Run every test (ARGS="-k word" for some)
	@echo "· running the tests"
	@$(RUN) -m pytest $(ARGS)

# A folder outside the checkout, so that `make clean` leaves it: about 450 MB.
TRITONSERVER := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/inkwell/tritonserver-2.51

test-triton: $(VENV)/.installed-dev  ## Run the tests that need NVIDIA's own tritonserver, fetching it once
	@echo "· NVIDIA's tritonserver in $(TRITONSERVER)"
	@mkdir -p $(dir $(TRITONSERVER)) && $(RUN) -m tests.support.nvidia_tritonserver $(TRITONSERVER)
	@INKWELL_TRITONSERVER=$(TRITONSERVER) $(RUN) -m pytest tests/integration/test_tritonserver.py $(ARGS)

soak: $(VENV)/.installed-dev  ## Break the services for an hour and measure it (RUNS="kills overload mixed" for some)
ifeq ($(RUNS),)
	@echo "· killing services and operations at random moments (tests/faults)"
	@INKWELL_KILLS=50 $(RUN) -m pytest tests/faults/test_operations_killed.py $(ARGS)
	@INKWELL_KILLS=20 $(RUN) -m pytest tests/faults/test_kills.py $(ARGS)
	@echo "· 50,000 requests that are almost right"
	@INKWELL_MUTATIONS=3200 $(RUN) -m pytest -s -o timeout=3600 tests/faults/test_mutated.py $(ARGS)
endif
	@$(RUN) -m tests.soak $(RUNS)

lint: $(VENV)/.installed-dev  ## Check style, types, imports between packages, and the protos
	@echo "· ruff"; $(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	@echo "· mypy"; $(RUN) -m mypy inkwell services tests benchmarks
	@echo "· import-linter"; $(VENV)/bin/lint-imports
	@echo "· buf"; protos/lint.sh

protos: $(VENV)/.installed  ## Generate the Python modules of the protos into inkwell/
	@$(RUN) protos/generate.py

bench: $(VENV)/.installed-dev  ## Measure against what one would pick instead (ONLY=name for one)
	@$(RUN) -m benchmarks $(ONLY)

eval: $(VENV)/.installed  ## Compare precisions by error rate, size and speed on DIR (with labels.tsv; default: the samples)
	@$(RUN) -m services.ocr.compare $(or $(DIR),models/handwriting-tiny/samples) $(ARGS)

compile-all: $(VENV)/.installed  ## Compile both embedded models to ONNX and OpenVINO in three precisions, and compare them
	@$(RUN) -m services.compiler.compile_all $(ARGS)

images:  ## Build the images for HARDWARE (cpu, cuda, rocm) with docker buildx; REGISTRY=host/ pushes them
	@REVISION=$$(git rev-parse HEAD) REGISTRY="$(REGISTRY)" docker buildx bake $(if $(REGISTRY),--push,--load) $(or $(HARDWARE),cpu)

lock:  ## Write requirements/*.txt anew from pyproject.toml
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" requirements/lock.sh

clean: down  ## Remove the environment and everything generated
	@rm -rf $(VENV) .run build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@rm -rf inkwell/common inkwell/compiler inkwell/diffusion inkwell/endpoint inkwell/gateway inkwell/ocr inkwell/operations

# --- the environment ---

$(VENV)/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Inkwell needs Python 3.11 or newer: apt-get install python3.11 python3.11-venv, or make PYTHON=..." >&2; exit 1; }
	@echo "· creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "the venv module is missing: apt-get install python3-venv" >&2; exit 1; }

# torch first and by itself: what decides between CPU and GPU builds is the index that it comes from.
$(VENV)/.torch: requirements/torch.txt | $(VENV)/bin/python
	@echo "· installing torch (the largest part)"
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -r requirements/torch.txt
	@touch $@

$(VENV)/.requirements: requirements/cpu.txt $(VENV)/.torch
	@echo "· installing $$(grep -c == requirements/cpu.txt) other libraries (a minute or two)"
	@$(PIP) install $(QUIET) -r requirements/cpu.txt
	@touch $@

$(VENV)/.installed: pyproject.toml hatch_build.py protos/generate.py $(shell find protos -name '*.proto') $(VENV)/.requirements
	@echo "· generating the protobuf modules and installing inkwell"
	@$(PIP) install $(QUIET) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: requirements/dev.txt $(VENV)/.installed
	@echo "· installing the test tools"
	@$(PIP) install $(QUIET) -r requirements/dev.txt
	@touch $@
