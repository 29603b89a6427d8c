# Lathe's commands. `make` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup env build run demo test chaos fuzz contract bench check fmt sqlx openapi sdk s3-test fresh image compose-test

# The build's environment, from what setup fetched. SQL is checked against .sqlx, so no build needs
# a database.
ENV := eval "$$(python3 docker/setup.py env)"; export SQLX_OFFLINE=true;

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 22

setup: ## Name what is missing, fetch libtorch and, where there is none, PostgreSQL
	@python3 docker/setup.py

env: ## Print the build's environment, for: eval "$(make -s env)"
	@python3 docker/setup.py env; echo "export SQLX_OFFLINE=true"

build: setup ## Build target/release/lathe
	@$(ENV) cargo build --release --locked -p lathe-api

run: build ## Start the whole stack (see `target/release/lathe serve --help`)
	@$(ENV) exec target/release/lathe serve

# CORPUS and INSTRUCTIONS: your own files in place of the built-in tasks. SEED: other rows, other weights.
demo: build ## Corpus to answering model in five minutes; stays serving until Ctrl-C
	@$(ENV) exec target/release/lathe demo $(if $(CORPUS),--corpus '$(CORPUS)') $(if $(INSTRUCTIONS),--instructions '$(INSTRUCTIONS)') $(if $(SEED),--seed '$(SEED)')

test: setup ## Run every test
	@$(ENV) cargo build --locked --workspace --all-targets; \
	  python3 .ci/with_postgres.py cargo test --locked --workspace --no-fail-fast

# CHAOS_ROUNDS, CHAOS_SEED: see docs/chaos.md.
chaos: setup ## Faults at random moments of random jobs, 200 rounds of them, and 20 at the default lease
	@$(ENV) cargo build --locked --workspace --all-targets; \
	  run() { env "$$@" cargo test --quiet --locked --workspace --test it -- --nocapture chaos::; }; \
	  run CHAOS_ROUNDS="$${CHAOS_ROUNDS:-200}" CHAOS_SEED="$${CHAOS_SEED:-1}"; run CHAOS_ROUNDS=20 CHAOS_LEASE=10 CHAOS_SEED=1001

# FUZZ_SECONDS: how long each of them.
fuzz: setup ## Every reader of a stranger's bytes on made-up input, ten minutes each
	@$(ENV) python3 .ci/fuzz.py

# REQUESTS, SEED, HOLD: see docs/contract.md.
contract: setup ## The whole OpenAPI document tried against a live server, 50,000 requests
	@$(ENV) cargo build --locked --workspace --bins; python3 tests/contract/run.py

# PART: one part alone, or several; docs/benchmarks.md lists them.
bench: build ## What a user would pick instead, beside Lathe: a table with its verdict last
	@$(ENV) python3 tests/bench/run.py $(PART)

sdk: build ## Generate clients from openapi/openapi.json; drive a live server with them and with the openai SDKs
	@$(ENV) python3 tests/clients/run.py

# The three below need Docker and nothing else; see docs/containers.md.
image: ## Build the image `lathe`
	@docker build -f docker/Dockerfile -t lathe .

compose-test: ## The main job through docker/compose.yaml, the container that trains killed on the way
	@python3 tests/containers/compose.py

fresh: ## `make demo` and `make test` in a bare Debian container, on a clone of what is committed
	@python3 tests/containers/fresh.py

s3-test: build ## Machines that share nothing but a database and a bucket, through losses of both kinds
	@$(ENV) python3 tests/bucket/run.py

check: setup ## Format, lints, generated files fresh
	@$(ENV) cargo fmt --all --check; \
	  cargo clippy --locked --workspace --all-targets -- -D warnings; \
	  cargo run --quiet --locked -p lathe-api -- openapi | diff -u openapi/openapi.json - \
	    || { echo "openapi/openapi.json is stale: run make openapi"; exit 1; }

fmt: ## Format the code
	@cargo fmt --all

sqlx: setup ## Write .sqlx anew, from the migrations and the queries in the code
	@$(ENV) rm -rf .sqlx.new; mkdir .sqlx.new; touch api/src/lib.rs jobs/src/lib.rs tests/src/lib.rs tests/it/main.rs; \
	  SQLX_OFFLINE=false SQLX_OFFLINE_DIR="$$PWD/.sqlx.new" \
	    python3 .ci/with_postgres.py --migrate cargo check --locked --workspace --all-targets; \
	  rm -rf .sqlx; mv .sqlx.new .sqlx

openapi: setup ## Write openapi/openapi.json anew, from the router
	@$(ENV) cargo run --quiet --locked -p lathe-api -- openapi > openapi/openapi.json.new; mv openapi/openapi.json.new openapi/openapi.json
