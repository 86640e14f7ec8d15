# Two commands do everything on a machine with Python >= 3.10, git and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := -m pip install --quiet --no-compile --constraint constraints.txt

.PHONY: help demo test lint types unit gpu docs site wheel clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: .venv/.demo ## train on real digits at base learning rates from 1e-8 to 1e6, and draw demo.png
	$(BIN)/python examples/demo.py

test: .venv/.dev ## everything that CI checks; what takes one core goes first, two at a time
	$(MAKE) --jobs 2 lint types docs wheel
	$(MAKE) unit

lint: .venv/.dev ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev ## strict type check of src
	$(BIN)/mypy

unit: .venv/.dev .venv/peers ## all tests
	$(BIN)/pytest --numprocesses 2 --dist loadgroup

# Where tests that name no device work on the GPU. Those of other files name theirs, start processes or need none.
ON_GPU := $(addprefix tests/test_,$(addsuffix .py,amp auto_start bases closures compile control counts edits fused \
	gradients groups hooks_and_schedulers paper per_group resume start telemetry tune))

gpu: .venv/.dev .venv/peers ## on a machine with a CUDA device: its tests, with each kernel, and the figures of docs/speed.md
	$(BIN)/pytest --numprocesses 4 tests/test_cuda.py tests/test_triton.py tests/test_kernels.py tests/test_checked.py
	MECHANIC_TEST_DEVICE=cuda $(BIN)/pytest --numprocesses 4 $(ON_GPU)
	MECHANIC_TEST_DEVICE=cuda MECHANIC_KERNEL=foreach $(BIN)/pytest --numprocesses 4 $(filter-out %fused.py %counts.py,$(ON_GPU))
	$(BIN)/python -m benchmarks.step_cost --device cuda --fill docs/speed.md --plot docs/step_cost_gpu.png

# What is in .venv/.dev is in it already; two that install at once would be in each other's way.
DEV := $(wildcard .venv/.dev)

docs: $(or $(DEV),.venv/.blocks) ## run every Python block of the documentation, and build it as a site, strictly
	$(BIN)/python tools/run_markdown.py docs/*.md
	$(BIN)/mkdocs build --strict --quiet

site: $(or $(DEV),.venv/.docs) ## show the documentation at http://127.0.0.1:8000, while it is written
	$(BIN)/mkdocs serve

wheel: .venv/.dev ## build wheel and sdist, check them, install the wheel alone, run README's examples there
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	@! find dist -type f -size +1000000c | grep . || { echo 'over 1 MB. Remedy: exclude files in pyproject.toml' >&2; exit 1; }
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python $(PIP_INSTALL) dist/*.whl
	cd dist && ../.venv-wheel/bin/python -W error -W 'ignore:Failed to initialize NumPy' ../tools/run_markdown.py ../README.md

clean: ## remove everything that make made
	rm -rf .venv .venv-wheel dist site demo.png

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python $(PIP_INSTALL) --editable '.[demo]'
	touch $@

.venv/.docs: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python $(PIP_INSTALL) --editable '.[docs]'
	touch $@

# What the Python blocks of the documentation import.
.venv/.blocks: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python $(PIP_INSTALL) --editable '.[demo,docs,huggingface,lightning]' pytorch-optimizer tensorboard
	touch $@

# Compiled on every core, without what is hardly imported; a few files of others are for other Pythons.
.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/(tests|ray|transformers/models)/' .venv/lib || true
	touch $@

# Version 0.0.1 has our import name, so it is installed aside; tests compare with it.
.venv/peers: .venv/bin/python
	rm -rf $@.new
	$(BIN)/python -m pip install --quiet --no-deps --target $@.new mechanic-pytorch==0.0.1
	mv $@.new $@
