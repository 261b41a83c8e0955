"""A small real worker for tests of jobs: python worker.py <verb> <run.json URI>. Its order's "plan" is a list of steps.

["events", n]            n metric events in one segment, numbered on within the attempt
["checkpoint", step]     a checkpoint of that step, with the validation loss that may follow
["report"]               a report of two files
["sleep", seconds]       go on at once when SIGTERM comes, unless deaf
["wait", path]           until a file exists
["await", key]           until an object is in the store
["only", attempt, ...]   the step in the rest, on that attempt only
["deaf"]                 ignore SIGTERM from here on
["die"]                  end like kill -9
["fail", reason]         publish FAILED
["end"]                  publish SUCCEEDED, with the last checkpoint
["progress", done, all]  a progress event and a log event
["model", kind]          publish SUCCEEDED, with a small model artifact

Started on several nodes (NNODES), the first does the order once all have met, and the others stay for as long as it does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.finetune.__main__ import who_am_i
from services.finetune.errors import InvalidArgument, Unavailable
from services.finetune.progress import Attempt, Fenced, Outcome, attempt_key, split_run_uri
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import File, Manifest, Parent, publish

stop = threading.Event()


def tiny_artifact(
    store: Store, kind: Any, text: str, parents: Sequence[Parent] = (), template: str = "tokenizer"
) -> str:
    """A model artifact of two small files; its digest."""
    blobs = {"config.json": store.put_blob(b"{}"), "model.safetensors": store.put_blob(text.encode() * 200_000)}
    files = tuple(File(path, blob.digest, blob.size) for path, blob in blobs.items())
    meta = {"architecture": "LlamaForCausalLM", "template": template, "generation": {"eos_token_id": [2]}}
    return publish(store, Manifest(kind, files, tuple(parents), meta))


class Worker:
    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.said = 0
        self.step = 0

    def do(self, what: str, *given: Any) -> None:
        if what == "only":
            if given[0] == self.attempt.number:
                self.do(*given[1:])
        elif what == "events":
            for _ in range(given[0]):
                self.said += 1
                values = {"loss": 1.0, "total_steps": 9, "eta_s": 1.0, "said": self.said, "by": self.attempt.number}
                self.attempt.emit("metric", step=self.said, values=values)
            self.attempt.flush()
        elif what == "checkpoint":
            self.step = given[0]
            more = {"validation_loss": given[1]} if given[1:] else {}
            self.attempt.checkpoint(self.step, f"sha256:{self.step:064d}", 0.5, **more)
            self.attempt.flush()
        elif what == "report":
            blobs = {"loss.png": b"a picture", "tensorboard/events": b"123" * 1_000_000}
            kept = {path: self.attempt.store.put_blob(data) for path, data in blobs.items()}
            files = tuple(File(path, blob.digest, blob.size) for path, blob in kept.items())
            self.attempt.emit("report", digest=publish(self.attempt.store, Manifest("report", files)))
            self.attempt.flush()
        elif what == "await":
            deadline = time.monotonic() + 60
            while self.attempt.store.get(given[0]) is None and time.monotonic() < deadline:
                time.sleep(0.02)
        elif what in ("sleep", "wait"):
            self.pause(what, given[0])
        elif what == "progress":
            self.attempt.emit("progress", done_bytes=given[0], total_bytes=given[1])
            self.attempt.emit("log", level="info", text="half done")
            self.attempt.flush()
        elif what == "model":
            digest = tiny_artifact(self.attempt.store, given[0], self.attempt.job_key)
            self.attempt.publish(Outcome("SUCCEEDED", {"model": digest}))
        else:
            self.leave(what, *given)

    def pause(self, what: str, given: Any) -> None:
        deadline = time.monotonic() + (given if what == "sleep" else 60)
        while time.monotonic() < deadline and not (what == "wait" and Path(given).exists()):
            if stop.wait(0.02):
                self.attempt.publish(Outcome("CANCELLED", {}))
                os._exit(0)

    def leave(self, what: str, *given: Any) -> None:
        if what == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif what == "die":
            print("a last word", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "complain":
            self.attempt.complain(Unavailable("nobody answers there", reason="HUB_UNREACHABLE"))
            os._exit(1)
        elif what == "fail":
            error = InvalidArgument("the user's fault", reason=given[0])
            self.attempt.publish(Outcome("FAILED", {}, error.to_json()))
        elif what == "end":
            self.attempt.publish(Outcome("SUCCEEDED", {"step": self.step, "checkpoint": f"sha256:{self.step:064d}"}))


def room_plan(order: dict[str, Any]) -> list[list[Any]]:
    """What to do for a room's own order: its job's id says if it is slow or fails."""
    if "slow" in order["job"]:
        return [["events", 1], ["sleep", 60]]
    if "faulty" in order["job"]:
        return [["fail", "DATASET_EMPTY"]]
    if "filed" in order["job"]:
        return [["report"], ["checkpoint", 10], ["end"]]
    if "keeps" in order["job"]:
        looked: list[list[Any]] = [["checkpoint", 10, 0.9], ["checkpoint", 20, 0.1], ["await", f"go/{order['job']}"]]
        return [*looked, *(["checkpoint", step, 0.5] for step in (30, 40, 50)), ["end"]]
    if order["kind"] == "train":
        return [["events", 3], ["checkpoint", 10], ["checkpoint", 20], ["end"]]
    kinds = {
        "import_model": "base",
        "assemble": "base",
        "reshard": "base",
        "export": "exported",
        "quantize": "quantized",
    }
    kind = next((kinds.get(task, task) for task in ("adapter", *kinds) if order[task]), "merged")
    return [["progress", 5, 10], ["model", kind]]


def lead() -> list[socket.socket]:
    """The other nodes, once all are there."""
    others = int(os.environ.get("NNODES", "1")) - 1
    if others == 0:
        return []
    with socket.create_server((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))) as server:
        return [server.accept()[0] for _ in range(others)]


def follow() -> None:
    """Stay until the first node says that it is done, or is gone."""
    while not stop.is_set():
        try:
            leader = socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=60)
        except OSError:
            time.sleep(0.02)
            continue
        os._exit(0 if leader.recv(3) == b"end" else 1)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    store_uri, key, number = split_run_uri(sys.argv[2])
    store = open_store(store_uri)
    order = store.get(f"{attempt_key(key, number)}/run.json")
    assert order is not None
    body = json.loads(order.data)
    plan = body.get("plan") or room_plan(body)
    while plan and plan[0][0] == "unclaimed":  # before the claim: ["unclaimed", attempt, path to wait for]
        _, only, path = plan.pop(0)
        deadline = time.monotonic() + 60
        while only == number and not Path(path).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    attempt = Attempt(store, key, number)
    if int(os.environ.get("NODE_RANK", "0")):
        follow()
        os._exit(1)
    try:
        attempt.claim(who_am_i())
        worker, others = Worker(attempt), lead()
        for step in plan:
            worker.do(*step)
        for other in others:
            other.sendall(b"end")
    except Fenced:
        print("fenced", flush=True)
        os._exit(75)
    os._exit(0)  # without the wait for the flushing thread


if __name__ == "__main__":
    main()
