# Everything a developer runs. `make help` lists the targets; each sets up what it needs.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.octavo-installed
READY := $(VENV)/.octavo-ready
NATIVE := scripts/build_native.py $(shell find pallas_kernels -name '*.cc' -o -name '*.h' -o -name '*.inc')
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
PROTO := $(wildcard proto/octavo/v1/*.proto)

CONFIG ?= configs/smollm2-135m-cpu.yaml
ARGS ?=
# Two workers suit two cores. Each has half of the tests in order, so that fixtures load once, and
# who is done first takes from the other.
PYTEST_ARGS ?= -n 2 --dist worksteal
OCTAVO_FUZZ_EXAMPLES ?= 20000
OCTAVO_KILLS ?= 50

.PHONY: help
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' \
		$(firstword $(MAKEFILE_LIST))

.PHONY: setup
setup: $(READY) $(MODEL) ## create .venv, install the pinned dependencies, fetch the model

$(INSTALLED): pyproject.toml constraints.txt hatch_build.py scripts/make_venv.sh
	@echo "installing octavo and its dependencies into $(VENV)"
	@scripts/make_venv.sh $(VENV)
	@touch $@

# Compiles native code if its sources have changed, or says why it can't: OCTAVO_NATIVE=require|no.
$(READY): $(INSTALLED) $(NATIVE)
	@$(BIN)/python -m scripts.build_native
	@touch $@

# Order-only: the model is fetched if it is missing, not when the environment is newer.
$(MODEL): | $(READY)
	@$(BIN)/python scripts/fetch_model.py $@

.PHONY: serve
serve: setup ## start the gRPC server; CONFIG=… and ARGS=… (such as --set server.port=0)
	@exec $(BIN)/octavo serve --config $(CONFIG) $(ARGS)

.PHONY: test
test: setup ## run all tests; PYTEST_ARGS=… selects (such as tests/core -x)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: cluster
cluster: setup cluster-venv ## two workers behind the SMG gateway (OpenAI, Anthropic); CONFIG=…
	@exec $(BIN)/python -m scripts.cluster --config $(CONFIG) $(ARGS)

.PHONY: cluster-venv
cluster-venv: $(READY) ## .venv-cluster: the gateway and OpenAI's client, from PyPI (also for the tests)
	@scripts/make_cluster_venv.sh .venv-cluster

.PHONY: gateway-test
gateway-test: setup cluster-venv ## the gateway's tests, over SmolLM2 instead of a tiny model
	OCTAVO_GATEWAY_CONFIG=$(CONFIG) $(BIN)/python -m pytest tests/serve/vllm/test_gateway.py $(ARGS)

.PHONY: browser
browser: $(READY) ## the page's tests in a headless Chromium; says what is missing if there is none
	@$(BIN)/python -m tests.dashboard.browser
	$(BIN)/python -m pytest tests/dashboard/test_browser.py $(PYTEST_ARGS)

.PHONY: screenshots
screenshots: $(READY) ## docs/images/, drawn anew by a headless Chromium
	$(BIN)/python -m scripts.screenshots docs/images

.PHONY: lint
lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(READY) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: types
types: $(READY) ## pyrefly
	$(BIN)/pyrefly check

.PHONY: kernels
kernels: $(READY) ## the kernels' whole grid of tests, each case in all interpreters (long)
	$(BIN)/python -m pytest tests/paged_attention tests/runtime/test_kernels_in_engine.py --exhaustive \
		$(PYTEST_ARGS)

.PHONY: mutants
mutants: $(READY) ## seeded mistakes in the kernels, each of which the tests must catch
	$(BIN)/python -m pytest tests/paged_attention -m mutants $(PYTEST_ARGS)

.PHONY: aot
aot: $(READY) ## compile kernels and whole steps for TPUs without one; ARGS=…
	$(BIN)/python -m engine.aot $(ARGS)

.PHONY: gpu-aot
gpu-aot: $(READY) ## compile the gpu kernels for an H100 without one; ARGS="--only decode"
	@scripts/make_gpu_venv.sh .venv-gpu
	@.venv-gpu/bin/python scripts/gpu_aot.py $(ARGS)

.PHONY: gpu-check
gpu-check: ## on an NVIDIA GPU: check the kernels on the device and time them; ARGS=folder of wheels
	@scripts/gpu_check.sh build/gpu-check $(ARGS)

.PHONY: fuzz
fuzz: $(READY) ## millions of random scheduler operations, and whole engines; OCTAVO_FUZZ_EXAMPLES=…
	OCTAVO_FUZZ_EXAMPLES=$(OCTAVO_FUZZ_EXAMPLES) \
		$(BIN)/python -m pytest tests/core/test_stateful.py tests/runtime/test_stateful_engine.py \
		--timeout 0 $(ARGS)

.PHONY: kills
kills: $(READY) ## kill -9 whole engines while they write their disk tier; OCTAVO_KILLS=…
	OCTAVO_KILLS=$(OCTAVO_KILLS) \
		$(BIN)/python -m pytest tests/runtime/test_engine_kills.py --timeout 0 -s $(ARGS)

.PHONY: lm-eval
lm-eval: setup ## score SmolLM2 with lm-eval over HTTP, and compare with a direct computation
	@scripts/make_client_venv.sh .venv-lm-eval tests/lm_eval/requirements.txt
	$(BIN)/python -m tests.lm_eval.check .venv-lm-eval/bin/lm_eval $(ARGS)

.PHONY: survival
survival: $(READY) ## every attack on a server as often as an attacker would (long)
	OCTAVO_SURVIVAL=1 $(BIN)/python -m pytest tests/survival --timeout 0 -n 0 $(ARGS)

.PHONY: native
native: $(INSTALLED) ## compile the native code for CPUs, as `make setup` does where it can; or fail
	@OCTAVO_NATIVE=require $(BIN)/python -m scripts.build_native

.PHONY: soak
soak: $(READY) ## a server at capacity with failures, every token compared; ARGS="--minutes 30"
	$(BIN)/python -m benchmarks soak $(ARGS)

.PHONY: bench
bench: setup ## benchmarks/, as docs/benchmarks/ reports them; ARGS=…
	$(BIN)/python -m benchmarks $(ARGS)

.PHONY: peers
peers: ## .venv-peers: vLLM for CPUs and llama.cpp's server, for `python -m benchmarks compare`
	@scripts/make_peers_venv.sh .venv-peers

.PHONY: proto
proto: $(READY) ## regenerate the gRPC stubs in engine/rpc
	$(BIN)/python -m grpc_tools.protoc -Iengine/rpc=proto \
		--python_out=. --grpc_python_out=. --pyi_out=. $(PROTO)

.PHONY: constraints
constraints: ## pin the newest versions that pyproject.toml allows in constraints.txt
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	scripts/make_venv.sh "$$scratch/venv" "" && \
	{ sed '/^#/!d' constraints.txt; \
	  "$$scratch/venv/bin/python" -m pip freeze --exclude octavo; } > "$$scratch/new" && \
	mv "$$scratch/new" constraints.txt

.PHONY: clean
clean: ## remove caches and build output
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis models/.fetch-*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## clean, and remove all environments, native code and the fetched model
	rm -f pallas_kernels/native/_octavo.*
	rm -rf $(VENV) .venv-gpu .venv-lm-eval .venv-cluster .venv-peers $(MODEL)
