"""The library's worker with another kind of work: python faulty.py train <run.json URI> ends as its order's "fault" says."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from services.finetune import __main__ as worker
from services.finetune.errors import BY_CODE


def fail(order: dict[str, Any], attempt: Any, stop: threading.Event, workdir: Path) -> dict[str, Any]:
    kind, given = order["fault"]
    if kind == "signal":
        os.kill(os.getpid(), given)
        threading.Event().wait(30)
    if kind == "defect":
        raise RuntimeError(given)
    raise BY_CODE[kind]("so it is", reason=given)


if __name__ == "__main__":
    worker._worker = lambda verb: lambda *given: worker._memory(lambda: fail(*given))  # type: ignore[assignment]
    sys.exit(worker.main())
