"""A rank of a test: trains the orders of a folder one after another, in one group of processes.

``python -m tests.finetune.train.together FOLDER`` with torchrun's environment. FOLDER has a file store and orders.json,
{name: {"run": TrainRun, "resume": ["<name>", step] or null}}; rank 0 writes told.json, {name: [event, ...]}.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

from services.finetune.config import from_json
from services.finetune.orders import TrainRun
from services.finetune.progress import Attempt, raise_fence
from services.finetune.store import Store, open_store
from services.finetune.train.loop import Trainer
from services.finetune.train.parallel import Group, join


def go(store: Store, name: str, data: dict[str, Any], group: Group, workdir: Path) -> list[dict[str, Any]]:
    """Train one order; what it told."""
    told: list[dict[str, Any]] = []
    attempt = Attempt(store, f"jobs/{name}", 1, relay=told.append)
    group.once(lambda: raise_fence(store, f"jobs/{name}", 1))
    workdir.mkdir(parents=True)
    done = Trainer(from_json(TrainRun, data), attempt, threading.Event(), workdir, group).run()
    return [*(e for e in told if e["type"] != "beat"), {"type": "done", **done}]


def checkpoints(told: list[dict[str, Any]]) -> dict[int, str]:
    """Digests by step."""
    return {e["step"]: e["digest"] for e in told if e["type"] == "checkpoint"}


def main() -> None:
    folder = Path(sys.argv[1])
    store = open_store((folder / "store").as_uri())
    told: dict[str, list[dict[str, Any]]] = {}
    with join(Attempt(store, "jobs/none", 1)) as group:
        for name, order in json.loads((folder / "orders.json").read_text()).items():
            if order["resume"]:
                # Only rank 0 knows.
                digests = group.from_first(lambda: {n: checkpoints(t) for n, t in told.items()})
                before, step = order["resume"]
                order["run"]["resume"] = {"name": before, "digest": digests[before][step]}
            print(name, flush=True)
            told[name] = go(store, name, order["run"], group, folder / f"{name}-{group.rank}")
    if group.speaks:
        (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
