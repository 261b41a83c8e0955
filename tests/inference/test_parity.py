"""From training to chat: a model answers only where its tokens are what it was trained on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceStub

from services.finetune.config import RunConfig, override, to_json
from services.finetune.convert import convert
from services.finetune.errors import FailedPrecondition
from services.finetune.orders import AdapterTask, ArtifactRef, ConvertRun, MergeTask, TrainRun
from services.finetune.progress import (
    Attempt,
    attempt_key,
    dump,
    raise_fence,
    read_outcome,
    read_segments,
    run_uri,
)
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import File, Manifest, load, publish, publish_directory
from services.inference.engines.__main__ import build
from tests.common.serving import refused, serve
from tests.finetune.prepare.test_certificate import another_template, swapped
from tests.inference import published
from tests.inference.conftest import Service
from tests.inference.wire import GREEDY, endpoint, turns
from tests.tiny import tiny_model


def ref(digest: str) -> ArtifactRef:
    return ArtifactRef(name="workspaces/default/models/tiny", digest=digest)


def trained(store: Store, base: str) -> list[str]:
    """Train on `base` twice, as workers do; the digests of the last checkpoints."""
    lines = "".join(json.dumps({"instruction": f"say {n}", "output": f"{n} it is"}) + "\n" for n in range(16))
    blob = store.put_blob(lines.encode())
    meta = {"format": "alpaca", "rows": 16}
    data = publish(store, Manifest("dataset", (File("a.jsonl", blob.digest, blob.size),), (), meta))
    changes = {"method": "lora", "quant.bits": 0, "lora.rank": 2, "data.max_length": 64, "schedule.max_steps": 2}
    config = override(RunConfig(), changes)
    run = TrainRun(job="workspaces/default/trainingJobs/t", config=config, base=ref(base), datasets=(ref(data),))
    found = []
    for key in ("jobs/t1", "jobs/t2"):
        raise_fence(store, key, 1)
        store.put(f"{attempt_key(key, 1)}/run.json", dump(to_json(run)))
        command = [sys.executable, "-m", "services.finetune", "train", run_uri(store.uri, key, 1)]
        assert subprocess.run(command, timeout=120).returncode == 0
        ended = read_outcome(store, key)
        assert ended is not None
        found.append(str(ended[1].result["checkpoint"]))
    return found


def converted(store: Store, workdir: Path, **task: Any) -> str:
    workdir.mkdir()
    raise_fence(store, f"jobs/{workdir.name}", 1)
    with Attempt(store, f"jobs/{workdir.name}", 1) as attempt:
        attempt.claim({"pid": 1})
        run = ConvertRun(job="workspaces/default/conversionJobs/c", **task)
        return str(convert(run, attempt, threading.Event(), workdir)["model"])


@dataclass(frozen=True)
class Made:
    """Digests by the acts that made them."""

    store: Store
    base: str
    checkpoints: list[str]
    adapter: str
    merged: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("p")
    store = open_store((root / "store").as_uri())
    base = publish_directory(store, "base", tiny_model(root / "tiny"), meta=published.meta())
    checkpoints = trained(store, base)
    adapter = converted(store, root / "adapter", adapter=AdapterTask(checkpoint=ref(checkpoints[0])))
    merged = converted(store, root / "merged", merge=MergeTask(adapter=ref(adapter), base=ref(base)))
    return Made(store, base, checkpoints, adapter, merged)


def tampered(made: Made, digest: str, tamper: Callable[[Path], None], folder: Path) -> str:
    """A model as it describes itself, over files that somebody changed."""
    manifest = load(made.store, digest)
    for f in manifest.files:
        (folder / f.path).write_bytes(b"".join(made.store.read_blob(f.digest)))
    tamper(folder)
    return publish_directory(made.store, manifest.kind, folder, manifest.parents, manifest.meta)


@pytest.fixture()
def engine(made: Made, tmp_path: Path) -> Iterator[Callable[..., InferenceStub]]:
    """Starts a real engine server on models by digest."""
    with contextlib.ExitStack() as stack:

        def start(model: str, *adapters: str) -> InferenceStub:
            order = {
                "endpoint": "workspaces/default/endpoints/e",
                "model": {"name": "workspaces/default/models/m", "digest": model},
                "adapters": [{"alias": f"a{n}", "name": "workspaces/default/models/a", "digest": d}
                             for n, d in enumerate(adapters)],
                "engine": "transformers",
                "dtype": "float32",
                "bits": 0,
            }  # fmt: skip
            home = tmp_path / f"e{len(list(tmp_path.iterdir()))}"
            home.mkdir()
            room, _ = asyncio.run(build(made.store, order, home))
            return InferenceStub(stack.enter_context(serve(room, home)))

        yield start


def chat(stub: InferenceStub, adapter: str = "") -> list[pb.ChatResponse]:
    return list(stub.Chat(pb.ChatRequest(adapter=adapter, messages=turns("hi"), sampling=GREEDY)))


def test_the_certificate_goes_along(made: Made) -> None:
    first, second, adapter, merged = (load(made.store, d) for d in (*made.checkpoints, made.adapter, made.merged))
    certificate = first.meta["certificate"]
    assert certificate["template"]["name"] == "tokenizer"
    assert certificate["tokenizer"] == load(made.store, made.base).file("tokenizer.json").digest
    assert second.meta["certificate"] == adapter.meta["certificate"] == merged.meta["certificate"] == certificate
    (entry,) = made.store.list("prepared/")
    kept = made.store.get(entry.key)
    assert kept is not None and load(made.store, json.loads(kept.data)["digest"]).meta["certificate"] == certificate


def test_the_second_job_finds_what_the_first_prepared(made: Made) -> None:
    assert made.checkpoints[0] == made.checkpoints[1]
    told = [
        next(e["text"] for _, part in read_segments(made.store, key, 1, -1) for e in part if e["type"] == "log")
        for key in ("jobs/t1", "jobs/t2")
    ]
    assert "prepared before" not in told[0] and "prepared before" in told[1]


def test_an_untouched_model_answers(made: Made, engine: Callable[..., InferenceStub]) -> None:
    assert chat(engine(made.merged))[-1].usage.completion_tokens
    on_base = engine(made.base, made.adapter)
    assert chat(on_base, "a0") and chat(on_base)


@pytest.mark.parametrize(("tamper", "index"), [(swapped, "17"), (another_template, "19")])
def test_chat_refuses_other_tokens(
    made: Made, engine: Callable[..., InferenceStub], tmp_path: Path, tamper: Callable[[Path], None], index: str
) -> None:
    for digest, adapters, alias in ((made.merged, (), ""), (made.base, (made.adapter,), "a0")):
        folder = tmp_path / f"t{alias}"
        folder.mkdir()
        stub = engine(tampered(made, digest, tamper, folder), *adapters)
        with refused(FailedPrecondition, "PARITY_MISMATCH") as error:
            chat(stub, alias)
        assert error[0].metadata["index"] == index and error[0].metadata["probe"] == "en"
        assert error[0].metadata["trained_token"] in error[0].message
        # What says nothing of a template is still answered; so is the base, which was trained elsewhere.
        assert list(stub.Generate(pb.GenerateRequest(text="hi", sampling=GREEDY)))
        assert not alias or chat(stub)


def test_an_endpoint_of_other_tokens_is_not_created(made: Made, service: Service, tmp_path: Path) -> None:
    store = service.store
    for digest in (made.base, made.adapter, made.merged):
        assert publish_copy(made.store, store, digest) == digest
    published.named(store, "good", made.merged, "merged")
    assert endpoint(service.stub, "good", "good", validate_only=True).template == "tokenizer"
    bad = tampered(made, made.merged, swapped, tmp_path)
    published.named(store, "bad", publish_copy(made.store, store, bad), "merged")
    with refused(FailedPrecondition, "PARITY_MISMATCH") as error:
        endpoint(service.stub, "bad", "bad", validate_only=True)
    assert error[0].metadata["index"] == "17" and "models/bad" in error[0].message
    published.named(store, "tuned", made.adapter, "adapter")
    published.named(store, "plain", made.base, "base")
    assert endpoint(service.stub, "a", "plain", adapters=[("one", "tuned")], validate_only=True)
    manifest = load(store, made.adapter)
    retold = publish(store, replace(manifest, meta={**manifest.meta, "template": "vicuna"}))
    published.named(store, "retold", retold, "adapter")
    with refused(FailedPrecondition, "PARITY_MISMATCH") as error:
        endpoint(service.stub, "a", "plain", adapters=[("one", "retold")], validate_only=True)
    assert error[0].metadata["own_template"] == "vicuna" and "models/retold" in error[0].message


def publish_copy(source: Store, target: Store, digest: str) -> str:
    """Bring an artifact over from another store."""
    manifest = load(source, digest)
    for f in manifest.files:
        target.put_blob(b"".join(source.read_blob(f.digest)))
    return publish(target, manifest)
