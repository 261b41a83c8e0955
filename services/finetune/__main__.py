"""A worker: ``python -m services.finetune {prepare|validate|train|convert} <run.json URI>``. It knows the store only.

Exit status: 0 when the outcome is SUCCEEDED or CANCELLED; the error's own status when the user must act; 75 when another
attempt owns the job; 1 when the machinery failed and another attempt may do better.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from services.finetune.config import from_json
from services.finetune.errors import Cancelled, QuartetError, ResourceExhausted, out_of_memory
from services.finetune.orders import ConvertRun, PrepareRun, TrainRun, ValidateRun
from services.finetune.progress import Attempt, Fenced, Outcome, attempt_key, split_run_uri
from services.finetune.store import open_store
from services.finetune.train import ranks

VERBS: Mapping[str, tuple[str, type[Any]]] = {
    "prepare": ("prepare", PrepareRun),
    "validate": ("prepare.validate", ValidateRun),
    "train": ("train", TrainRun),
    "convert": ("convert", ConvertRun),
}
"""By verb: the module that has a function of that name, and the class of its orders."""

STOPPING = (signal.SIGTERM, signal.SIGINT)


def who_am_i() -> dict[str, Any]:
    """What lets a service find this process again: its start time tells it from a later one with the same pid."""
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    return {"host": socket.gethostname(), "pid": os.getpid(), "start_ticks": int(ticks)}


def work(kind: str, uri: str, stop: threading.Event) -> int:
    """Do the order at `uri`; the exit status."""
    store_uri, job_key, number = split_run_uri(uri)
    store = open_store(store_uri)
    # Several processes may train together; see services.finetune.train.ranks.
    line = ranks.open_line(os.environ) if kind == "train" else None
    follows = kind == "train" and ranks.follows(os.environ)
    with Attempt(store, job_key, number, line.send if line else None, follows) as attempt:
        attempt.claim(who_am_i())
        order = store.get(f"{attempt_key(job_key, number)}/run.json")
        if order is None:
            raise RuntimeError(f"{uri} does not exist")
        try:
            with tempfile.TemporaryDirectory(prefix="quartet-") as workdir:
                result = _worker(kind)(json.loads(order.data), attempt, stop, Path(workdir))
            attempt.publish(Outcome("SUCCEEDED", result))
        except Fenced:
            raise
        except Cancelled:
            attempt.publish(Outcome("CANCELLED", {}))
        except QuartetError as error:
            # More memory will not come by itself; a full disk may be cleared.
            if error.retryable and error.reason != "OUT_OF_MEMORY":
                attempt.complain(error)
                raise
            attempt.publish(Outcome("FAILED", {}, error.to_json()))
            return error.exit_status
    return 0


def _worker(kind: str) -> Callable[[Any, Attempt, threading.Event, Path], dict[str, Any]]:
    """What does the orders of a verb; only its own libraries are loaded."""
    module, order = VERBS[kind]
    do = getattr(import_module(f"services.finetune.{module}"), kind)
    return lambda data, *rest: _memory(lambda: do(from_json(order, data), *rest))


def _memory(do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return do()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ResourceExhausted(
            "memory ran out; lower schedule.batch_size or data.max_length, set model.gradient_checkpointing to full, or use "
            "the qlora method",
            reason="OUT_OF_MEMORY",
        ) from error


def _stop(stop: threading.Event) -> None:
    """Ask for an end in good order; whoever asks again does not want to wait for it."""
    stop.set()
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)


def main() -> int:
    # DeepSpeed's launcher puts this first, beside LOCAL_RANK in the environment, which is read.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    if len(words) != 2 or words[0] not in VERBS:
        print(f"usage: python -m services.finetune {{{'|'.join(VERBS)}}} <run.json URI>", file=sys.stderr)
        return 64
    os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    # On a GPU, steps of changing size would leave holes between fixed segments; read when torch starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if words[0] != "convert":
        os.environ["HF_HUB_OFFLINE"] = "1"  # the store has all that training needs
    # It tells every worker on a CPU of a package for faster kernels that would be fetched from a hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    stop = threading.Event()
    for number in STOPPING:
        signal.signal(number, lambda *_: _stop(stop))
    try:
        return work(words[0], words[1], stop)
    except Fenced as error:
        print(f"worker: {error.message}", file=sys.stderr)
        return error.exit_status
    except QuartetError as error:
        print(f"worker: {error.message}", file=sys.stderr)
        return 1
    finally:
        # All is told. A service that hears of it at once may ask an end of what is ending, and must not spoil its status.
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
