# One entry a task. Each does all its set-up: a virtual environment in .venv, created once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint docs bench clean

demo: $(READY)
	@BIN=$(BIN) sh ci/demo

test: $(READY)
	$(BIN)/python -m pytest $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python docs/generate.py

bench: $(READY)
	$(BIN)/python bench/builds.py
	$(BIN)/python bench/ov.py
	$(BIN)/python bench/decode.py
	$(BIN)/python bench/quality.py
	$(BIN)/python bench/quality_encoder.py
	$(BIN)/python bench/transfer.py
	$(BIN)/python bench/trt.py
	$(BIN)/python bench/page.py

# torch is asked for first, alone and by its exact version: any other way may pull gigabytes of CUDA.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint ci/constraints.txt --editable '.[test,lint]'
	@touch $@

clean:
	rm -rf $(VENV) artifacts/*/ .mypy_cache .ruff_cache .pytest_cache
