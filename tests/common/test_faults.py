"""Each way a worker can end: its exit status, and whether its job is tried again."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.common.jobs import Jobs
from services.common.launchers import ONE, Handle, Shape
from services.common.launchers.local import LocalLauncher
from services.common.records import Record, Records
from services.common.supervisor import Work
from services.finetune import progress
from services.finetune.errors import BY_CODE
from services.finetune.store import Store
from tests.common.jobbing import NAME, ROOT, until

FAULTY = Path(__file__).with_name("faulty.py")
USER, AGAIN, TAKEN = "FAILED at once", "tried again", "tried again, and not counted"
FAULTS: Mapping[str, tuple[tuple[str, Any], int, str]] = {
    "invalid": (("INVALID_ARGUMENT", "X"), 65, USER),
    "range": (("OUT_OF_RANGE", "X"), 65, USER),
    "missing": (("NOT_FOUND", "X"), 66, USER),
    "exists": (("ALREADY_EXISTS", "X"), 73, USER),
    "state": (("FAILED_PRECONDITION", "X"), 78, USER),
    "denied": (("PERMISSION_DENIED", "X"), 77, USER),
    "unknown-caller": (("UNAUTHENTICATED", "X"), 77, USER),
    "lacking": (("UNIMPLEMENTED", "X"), 64, USER),
    "out-of-memory": (("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY"), 73, USER),
    "cuda-out-of-memory": (("defect", "DefaultCPUAllocator: can't allocate memory"), 73, USER),
    "disk-full": (("RESOURCE_EXHAUSTED", "DISK_FULL"), 1, AGAIN),
    "aborted": (("ABORTED", "X"), 1, AGAIN),
    "away": (("UNAVAILABLE", "X"), 1, AGAIN),
    "late": (("DEADLINE_EXCEEDED", "X"), 1, AGAIN),
    "torn": (("DATA_LOSS", "X"), 1, AGAIN),
    "internal": (("INTERNAL", "X"), 1, AGAIN),
    "defect": (("defect", "a defect of ours"), 1, AGAIN),
    "gpu-lost": (("defect", "CUDA error: the device is gone"), 1, AGAIN),
    "killed-for-memory": (("signal", int(signal.SIGKILL)), 128 + 9, AGAIN),
    "segfault": (("signal", int(signal.SIGSEGV)), 128 + 11, AGAIN),
    "bus-error": (("signal", int(signal.SIGBUS)), 128 + 7, AGAIN),
    "told-to-leave": (("CANCELLED", "STOPPED"), 0, TAKEN),
}


class Statuses(LocalLauncher):
    """The local launcher with a shell in between, which stays to note how the worker ended."""

    def launch(self, command: Sequence[str], name: str, env: Mapping[str, str], shape: Shape = ONE) -> Handle:
        noted = ["sh", "-c", 'trap "" TERM; "$@"; echo $? > "$0"', str(self._logs / f"{name}.status")]
        return super().launch(
            [*noted, sys.executable, str(FAULTY), *command[3:]], name, {"PYTHONPATH": str(ROOT), **env}
        )

    def status(self, name: str) -> int:
        """Its end comes a moment after its outcome."""
        path, deadline = self._logs / f"{name}.status", time.monotonic() + 60
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < deadline, name
            time.sleep(0.02)
        return int(path.read_text())


def test_every_class_has_its_case() -> None:
    assert {code for (code, _), _, _ in FAULTS.values()} >= set(BY_CODE)


def test_how_workers_end_is_how_their_jobs_go_on(sqlite_url: str, file_store: Store, tmp_path: Path) -> None:
    launcher = Statuses(tmp_path)
    work = Work("trainingJob", "train", lambda job: {"fault": job.body["spec"]["fault"]}, lambda job, result: {})
    jobs = Jobs(Records(sqlite_url), file_store, launcher, work, max_workers=3, grace_s=5)
    for name, (fault, _, _) in FAULTS.items():
        jobs.create(f"{NAME}-{name}", {"fault": list(fault)}, "", "")

    def told(job: Record) -> bool:
        return job.state == "FAILED" or "not_before" in job.body

    for name, (fault, status, what) in FAULTS.items():
        job = until(jobs, f"{NAME}-{name}", told, 120)
        key = job.body["key"].removeprefix("jobs/")
        seen = USER if job.state == "FAILED" and job.body["attempt"] == 1 else AGAIN if job.body["lost"] else TAKEN
        assert (name, launcher.status(f"{key}-1"), seen) == (name, status, what)
        if what == USER and fault[0] in BY_CODE:
            assert (job.body["error"]["code"], job.body["error"]["reason"]) == fault
        if what == AGAIN and fault[0] in BY_CODE:
            complaint = progress.read_fault(file_store, job.body["key"], 1)
            assert complaint is not None and complaint["code"] == fault[0], "nobody will know why"
        jobs.cancel(f"{NAME}-{name}")
    jobs.records.close()
