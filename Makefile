# The front door. Everything below works from a fresh clone: scripts/setup installs what is missing.

PYTHON := .venv/bin/python
ARGS ?=
# Each worker has a private server of its own; one that is given would run out of slots.
WORKERS ?= -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test faults soak fuzz check bench bench-fanout format containers lock setup setup-python setup-browser clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: setup ## walstream on a throwaway PostgreSQL (ARGS="--seconds 20")
	@.venv/bin/walstream demo $(ARGS)

# Private clusters are skipped where another server is given and no programs are there.
test: $(if $(WALSTREAM_TEST_DSN),setup-python,setup) setup-browser ## the tests (ARGS="-k slot"); WALSTREAM_TEST_DSN names a server to use
	$(PYTHON) -m pytest $(if $(WALSTREAM_TEST_DSN),,$(WORKERS)) $(ARGS)

faults: setup ## 500 faults of network, server, disk and people (WALSTREAM_FAULTS, WALSTREAM_FAULTS_SEED)
	$(PYTHON) -m pytest -m faults $(ARGS)

soak: setup ## the long runs: over an hour (WALSTREAM_SOAK_SECONDS=600 for less)
	$(PYTHON) -m pytest -m soak $(ARGS)

fuzz: setup-python ## the messages of Realtime's clients, by coverage (ARGS="frame -runs=10000000")
	$(PYTHON) -m pip install --quiet atheris==3.0.0
	$(PYTHON) -m fuzz.realtime $(or $(ARGS),session)

check: setup-python ## linters, types and the layers of the imports
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports --no-logo

bench: setup ## walstream against pg_recvlogical (ARGS="--json")
	@$(PYTHON) -m bench $(ARGS)

bench-fanout: setup ## thousands of clients by HTTP: changes a second, latency, memory (ARGS="--json")
	@$(PYTHON) -m bench.fanout $(ARGS)

containers: ## docker-compose.yml up from nothing, a change through it, and down (COMPOSE, ENGINE)
	@scripts/compose-check

format: setup-python ## put the code into its form
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

lock: setup-python ## renew requirements.lock from pyproject.toml
	$(PYTHON) -m pip install --quiet uv
	$(PYTHON) -m uv pip compile pyproject.toml --extra service --group dev --upgrade --quiet \
	    --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --custom-compile-command "make lock" --output-file requirements.lock

setup: ## install what is missing: Python packages, PostgreSQL, wal2json
	@scripts/setup

setup-python:
	@scripts/setup --no-server

setup-browser:
	@scripts/setup --browser

clean: ## remove the virtual environment and what the tools left
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage
