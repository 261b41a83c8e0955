"""A store in a folder, an attempt on it, and tiny models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.finetune.convert import convert
from services.finetune.orders import ConvertRun
from services.finetune.progress import Attempt, raise_fence
from services.finetune.store import Store, open_store
from tests.tiny import tiny_model

Convert = Callable[..., str]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/store")


@pytest.fixture
def do(store: Store, tmp_path: Path) -> Convert:
    """Run an order as a worker does; the digest of the model made."""
    count = 0

    def run(stop: threading.Event | None = None, **task: Any) -> str:
        nonlocal count
        count += 1
        workdir = tmp_path / f"work{count}"
        workdir.mkdir()
        raise_fence(store, f"jobs/j{count}", 1)
        with Attempt(store, f"jobs/j{count}", 1) as attempt:
            attempt.claim({"pid": 1})
            order = ConvertRun(job="workspaces/w/conversionJobs/j", **task)
            return str(convert(order, attempt, stop or threading.Event(), workdir)["model"])

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "llama")


def load_whole(folder: Path) -> Any:
    """The model as stock transformers loads it, with no weight missing or left over."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model
