"""job."""

from __future__ import annotations

import queue
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quartet.conversion.v1 import conversion_pb2
from quartet.training.v1 import training_pb2

from services.client.client import Client
from services.client.commands import connect
from services.client.download import download_job_files
from services.client.retry import pages
from services.client.show import bar, event_line, out, plain, table, tell
from services.common.status import from_status
from services.finetune.errors import FailedPrecondition, QuartetError, Unimplemented

ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
SILENCE_S = 0.5
LOOK_S = 0.3


def list_all(a: Namespace) -> None:
    with connect(a) as client:
        training = training_pb2.ListTrainingJobsRequest(parent=client.parent)
        conversion = conversion_pb2.ListConversionJobsRequest(parent=client.parent)
        jobs = list(pages(client.training.ListTrainingJobs, training, "training_jobs"))
        converted = list(pages(client.conversion.ListConversionJobs, conversion, "conversion_jobs"))
    if a.json:
        out({"jobs": [plain(j) for j in jobs], "conversion_jobs": [plain(j) for j in converted]})
        return
    both = sorted([*jobs, *converted], key=lambda j: j.create_time.ToNanoseconds(), reverse=True)
    table(["job", "state", "attempt"], [(j.name, plain(j)["state"], j.attempt) for j in both])


def get(a: Namespace) -> None:
    with connect(a) as client:
        out(plain(client.job(a.job)))


def watch(a: Namespace) -> int:
    with connect(a) as client:
        return follow(client, client.job(a.job).name, a.json, a.after, stream=True)


def logs(a: Namespace) -> None:
    """Events up to now."""
    with connect(a) as client:
        job = client.job(a.job)
        ended = plain(job)["state"] in ENDED
        for event in client.watch(job.name) if ended else _so_far(client, job.name):
            out(plain(event)) if a.json else print(f"{event.sequence:5d}  {event_line(event)}")


def files(a: Namespace) -> None:
    with connect(a) as client:
        found = job_files(client, client.name("trainingJobs", a.job))
    if a.json:
        out({"files": [plain(f) for f in found]})
        return
    table(["file", "bytes"], [(f.path, f.size_bytes) for f in found])


def download(a: Namespace) -> None:
    with connect(a) as client, bar("downloading", a.json) as told:
        name = client.name("trainingJobs", a.job)
        found = job_files(client, name)
        download_job_files(client, name, found, Path(a.directory), told)
    paths = [str(Path(a.directory) / f.path) for f in found]
    out({"files": paths}) if a.json else print("\n".join(paths) or f"{name} has no files yet")


def job_files(client: Client, name: str) -> list[training_pb2.TrainingFile]:
    request = training_pb2.ListTrainingFilesRequest(parent=name, page_size=1000)
    return list(pages(client.training.ListTrainingFiles, request, "files"))


def cancel(a: Namespace) -> None:
    with connect(a) as client:
        job = client.cancel(client.job(a.job).name)
    out(plain(job)) if a.json else print(f"{job.name} is asked to end")


def pause(a: Namespace) -> None:
    """Asks, and with --wait stays until the job's place is free."""
    with connect(a) as client:
        job = client.pause(_training_job(client, a.job))
        while a.wait and (state := plain(job)["state"]) != "PAUSED":
            if state in ENDED:
                raise FailedPrecondition(f"{job.name} ended {state} before it could be paused", reason="JOB_ENDED")
            time.sleep(LOOK_S)
            job = client.job(job.name)
    done = plain(job)["state"] == "PAUSED"
    said = "is paused" if done else "is asked to save and stop"
    out(plain(job)) if a.json else print(f"{job.name} {said}; go on with: quartet job resume {job.name}")


def resume(a: Namespace) -> int:
    """Asks, and with --wait follows the job to its end."""
    with connect(a) as client:
        name = _training_job(client, a.job)
        # Only what comes from here on is news.
        seen = [event.sequence for event in _so_far(client, name)] if a.wait else []
        job = client.resume(name)
        if a.wait:
            return follow(client, name, a.json, max(seen, default=0))
    out(plain(job)) if a.json else print(f"{name} goes on; watch it with: quartet job watch {name}")
    return 0


def _training_job(client: Client, text: str) -> str:
    """The job's full name. Unimplemented (JOB_NOT_PAUSABLE) if it is of another kind."""
    name = str(client.job(text).name)
    if "/trainingJobs/" not in name:
        raise Unimplemented(f"{name} is no training job, and only those can be paused", reason="JOB_NOT_PAUSABLE")
    return name


def delete(a: Namespace) -> None:
    with connect(a) as client:
        name = client.name("trainingJobs", a.job)
        client.training.DeleteTrainingJob(training_pb2.DeleteTrainingJobRequest(name=name))
    out({"deleted": name}) if a.json else print(f"{name} is forgotten")


def follow(client: Client, name: str, as_json: bool, after: int = 0, stream: bool = False) -> int:
    """Show a job to its end; its error's exit status if it failed. One that is paused is waited for: somebody may resume
    it. Ctrl-C lets go of it and says how to come back.

    JSON is the job at its end, or with `stream` each event on a line.
    """
    paused = False
    try:
        for event in client.watch(name, after):
            if event.WhichOneof("event") == "state" and (paused := plain(event)["state"]["state"] == "PAUSED"):
                print(f"paused; go on with: quartet job resume {name}", file=sys.stderr, flush=True)
            if as_json and stream:
                out(plain(event))
            elif event.WhichOneof("event") not in ("progress", "prepared") and not as_json:
                print(event_line(event), flush=True)
    except KeyboardInterrupt:
        how = f"is paused; go on with: quartet job resume {name}" if paused else "goes on"
        print(f"\nthe job {how}; come back with: quartet job watch {name}", file=sys.stderr)
        return 130
    job = client.job(name)
    if as_json and not stream:
        out(plain(job))
    state = plain(job)["state"]
    if state == "FAILED":
        # With --json what was printed says the same.
        return tell(from_status(job.error), as_json=False)
    if state == "CANCELLED":
        print("the job was cancelled", file=sys.stderr)
        return 130
    return 0


def _so_far(client: Client, name: str) -> Iterator[Any]:
    """A live job's events that exist now: the stream is left when it falls silent for SILENCE_S."""
    events: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        try:
            for event in client.watch(name):
                events.put(event)
            events.put(None)
        except (QuartetError, ValueError) as error:
            # ValueError: the channel was closed, because nobody waits any more.
            events.put(error)

    threading.Thread(target=read, daemon=True).start()
    # The first event may take a connection; a job has one from its birth.
    wait_s = 10.0
    while True:
        try:
            event = events.get(timeout=wait_s)
        except queue.Empty:
            return
        if isinstance(event, Exception):
            raise event
        if event is None:
            return
        yield event
        wait_s = SILENCE_S
