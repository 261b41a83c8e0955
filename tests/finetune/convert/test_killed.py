"""A merge that is killed and taken up again: the same model, no file made twice, nothing left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from services.finetune.convert.merge import merge
from services.finetune.orders import ArtifactRef, MergeTask
from services.finetune.progress import Attempt, raise_fence
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import Parent, load, publish_directory
from services.finetune.store.file import FileStore
from services.finetune.store.s3 import S3Store
from tests.finetune.store.test_streams import leftovers

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["services.finetune.convert.merge", "services.finetune.store.s3"])
JOB = "jobs/killed"


class Counting:
    """A store that kills this process at one of its calls. Without that number it only counts."""

    def __init__(self, store: Store, last: int = 0) -> None:
        self._store, self._last, self.calls, self.streamed = store, last, 0, list[str]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found):
            return found
        self.calls += 1
        if self.calls == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "put_stream":
            self.streamed.append(name)
        return found


def small_pieces() -> None:
    """Let a model of some megabytes have many slices and parts."""
    from services.finetune.convert import stream
    from services.finetune.store import s3_stream

    stream.SLICE_BYTES, s3_stream.PART_BYTES = 1 << 19, 5 << 20


def attempt_merge(store: Any, task: MergeTask, number: int) -> str:
    raise_fence(store, JOB, number)
    attempt = Attempt(store, JOB, number)
    attempt.check()
    return merge(task, attempt, threading.Event())


def be_killed(uri: str, keys: dict[str, str], task: MergeTask, number: int, last: int) -> None:
    os.environ.update(keys)
    small_pieces()
    attempt_merge(Counting(open_store(uri), last), task, number)


def base_and_adapter(store: Store, folder: Path) -> MergeTask:
    """Three files of which the last is not touched."""
    torch.manual_seed(0)
    names = [f"model.layers.{n}.{part}_proj" for n in range(3) for part in ("q", "k", "v")]
    base, lora = folder / "base", folder / "adapter"
    base.mkdir()
    lora.mkdir()
    for n in range(3):
        held = {f"{name}.weight": torch.randn(1024, 2048).bfloat16() for name in names[3 * n : 3 * n + 3]}
        save_file(held, base / f"model-{n + 1:05d}-of-00003.safetensors")
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": False, "architectures": ["X"]}))
    meta = {"template": "tokenizer", "system": "", "base_name": "b", "dtype": "bfloat16"}
    made = publish_directory(store, "base", base, meta=meta)
    pairs: dict[str, torch.Tensor] = {}
    for name in names[:6]:
        pairs[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, 2048)
        pairs[f"base_model.model.{name}.lora_B.weight"] = torch.randn(1024, 4)
    save_file(pairs, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    adapter = publish_directory(store, "adapter", lora, [Parent("base", made)], meta)
    return MergeTask(adapter=ArtifactRef(name="a", digest=adapter), base=ArtifactRef(name="b", digest=made))


def forget_blob(store: Store, digest: str) -> None:
    if isinstance(store, FileStore):
        store.blob_path(digest).unlink(missing_ok=True)
    else:
        assert isinstance(store, S3Store)
        store.drop(store.blob_key(digest))


def kill_and_resume(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: int) -> None:
    from services.finetune.convert import stream
    from services.finetune.store import s3_stream

    monkeypatch.setattr(stream, "SLICE_BYTES", 1 << 19)
    monkeypatch.setattr(s3_stream, "PART_BYTES", 5 << 20)
    store = open_store(uri)
    task = base_and_adapter(store, tmp_path)
    whole: Any = Counting(store)
    expected = attempt_merge(whole, task, 1)
    files = {f.path: f.digest for f in load(store, expected).files}
    untouched = "model-00003-of-00003.safetensors"
    assert files[untouched] == load(store, task.base.digest).file(untouched).digest
    assert len(whole.streamed) == 2
    for n in range(points):
        for entry in store.list(f"{JOB}/files/"):
            store.delete(entry.key)
        for path in files.keys() - {untouched}:
            if path.endswith(".safetensors"):
                forget_blob(store, files[path])
        last = 2 + (whole.calls - 4) * n // max(points - 1, 1)
        keys = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
        child = FORKS.Process(target=be_killed, args=(store.uri, keys, task, 2 * n + 2, last))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL, (n, last)
        finished = len(store.list(f"{JOB}/files/"))
        again: Any = Counting(store)
        assert attempt_merge(again, task, 2 * n + 3) == expected, (n, last)
        assert len(again.streamed) == 2 - finished, (n, last)
        assert leftovers(store) == [], (n, last)


def test_a_killed_merge_is_taken_up_again(store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_and_resume(store_uri, tmp_path, monkeypatch, points=4)


@pytest.mark.slow
def test_a_merge_killed_anywhere_is_taken_up_again(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_and_resume(store_uri, tmp_path, monkeypatch, points=20)
