# Every target works in the project's own .venv. `make` alone lists them.
PYTHON ?= python3
TORCH ?=
OVERRIDES ?=
BENCH ?=
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
.DEFAULT_GOAL := help
.PHONY: help setup fit test test-slow check format bench bench-gpu build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=python3.12  TORCH=torch==2.13.0  OVERRIDES='ffn=dense seed=2'  WORKERS=4"

setup: $(STAMP) ## create .venv with the package (editable) and its tools; nothing to do when it is up to date

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: PYTHON=$(PYTHON) is not a Python of version 3.11 or later; try: make setup PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e '.[dev]'
	@touch $@

fit: setup ## train with the default configuration; OVERRIDES= takes Hydra overrides
	$(BIN)/python -m pkm_lightning fit $(OVERRIDES)

test: setup ## the tests that need no GPU and little time
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not slow and not gpu'

test-slow: setup ## all other tests; those for a GPU are skipped without one
	$(BIN)/python -m pytest -m 'slow or gpu'

check: setup ## formatting, lint, types and floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## time the package beside its peers on the CPU, about 22 minutes; BENCH=--out writes scripts/results/
	$(BIN)/python scripts/bench_ops.py --device cpu $(BENCH)
	$(BIN)/python scripts/bench_train.py --device cpu $(BENCH)
	$(BIN)/python scripts/bench_token_tables.py --device cpu $(BENCH)
	$(BIN)/python scripts/bench_decode.py --device cpu $(BENCH)
	$(BIN)/python scripts/bench_mmap.py $(BENCH)
	$(BIN)/python scripts/bench_generation.py $(BENCH)
	$(BIN)/python scripts/bench_peer_memory.py
	$(BIN)/python scripts/bench_trainer_overhead.py --steps 40 --rounds 3
	$(BIN)/python scripts/bench_callbacks.py --steps 100 --rounds 3

bench-gpu: ## R1 to R8 on a GPU in at most 8 minutes, by the system's PYTHON, which needs torch and triton only
	PYTHONPATH=. $(PYTHON) scripts/bench_gpu.py --device cuda $(BENCH)

build: setup ## sdist and wheel in dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove builds and caches; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
