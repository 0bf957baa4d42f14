# Everything goes through here; CI calls only `make test`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## Show the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 18

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[local,paper,dev]'
	touch $@

setup: $(READY) ## Create .venv with everything the project needs

demo: $(READY) ## Start the whole stack, send a mix of prompts at once, show the text and a table
	$(BIN)/bucketserve demo

up: $(READY) ## Start the whole stack and keep it running until Ctrl-C
	$(BIN)/bucketserve up

test: check ## All checks and tests that CI runs (about ten minutes on 2 cores)
	$(BIN)/python -m pytest -q -m 'not slow and not gpu'

test-fast: $(READY) ## Unit and property tests only
	$(BIN)/python -m pytest -q tests/unit tests/property

test-e2e: $(READY) ## Tests over real processes only
	$(BIN)/python -m pytest -q tests/e2e

fuzz: $(READY) ## 100,000 random inputs to every RPC of real processes
	FUZZ_CASES=100000 $(BIN)/python -m pytest -q tests/e2e/test_fuzz.py

check: protos-check lint types imports docs-check ## Everything that is checked without running it

protos: $(READY) ## Generate libs/bucketserve/v1 from protos/
	$(BIN)/python scripts/gen_protos.py

protos-check: $(READY) ## Lint the protos and fail if the generated code is not current
	$(BIN)/buf lint
	$(BIN)/buf format -d --exit-code
	$(BIN)/python scripts/gen_protos.py --check

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

bench-core: $(READY) ## core.step at growing queues
	$(BIN)/python benchmarks/core_step.py

paper: $(READY) ## Reproduce the paper's evaluation into docs/paper
	$(BIN)/python benchmarks/paper.py

compose-check: $(READY) ## docker-compose.yml parses, with the real Compose binary
	$(BIN)/docker-compose config -q

k8s-render: $(READY) ## Lint, render and validate the Helm chart
	$(BIN)/python -m pytest -q tests/deploy

images: ## Build the images (needs Docker)
	docker compose build

clean: ## Remove what was built
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist

.PHONY: help setup demo up test test-fast test-e2e fuzz check protos protos-check docs docs-check format lint types imports bench-path \
	bench-core paper compose-check k8s-render images clean
