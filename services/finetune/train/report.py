"""What a run tells while it goes, and leaves behind: an artifact of kind "report".

    steps.jsonl.gz       the step log; see steplog.py
    metrics.jsonl.gz     the metric events
    samples.jsonl        the answers to prompts
    loss.png             training loss, validation loss and rate by step
    tensorboard/         the same numbers for TensorBoard
    logs/rank-<n>.txt    what each process said
    summary.json         where the run stands
    wandb/, mlflow/      runs of trackers that were not told where to send them

It is stored with each checkpoint and at the end, whatever the end is. A resumed attempt takes the report of the checkpoint
that it goes on from, so its own tells the whole run, each step once.
"""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from services.finetune.config import keys, to_json
from services.finetune.orders import TrainRun
from services.finetune.progress import Attempt, Event
from services.finetune.store.artifacts import load, materialise, publish_directory
from services.finetune.train.curves import draw_losses, write_tensorboard
from services.finetune.train.steplog import NAME, write_log
from services.finetune.train.trackers import Trackers

DRAW_SHARE = 0.01
"""Part of the time between two checkpoints that drawing may take; what would take longer waits for a later one."""
FIRST_DRAWING_S = 2.0
"""What drawing is thought to take until it is known."""
QUICK = 5000
"""Metric events whose drawing fits into the time that a worker has to end."""
_TAKEN_OVER = ("metrics.jsonl.gz", "samples.jsonl", "logs/rank-0.txt")


class Silent:
    """The report of a rank that does not speak for the run: of all that it is told only warnings go out."""

    def __init__(self, attempt: Attempt, rank: int) -> None:
        self._attempt = attempt
        self._rank = rank

    def log(self, text: str, level: str = "info") -> None:
        if level != "info":
            self._attempt.emit("log", level=level, text=f"rank {self._rank}: {text}")

    def warn(self, text: str) -> None:
        self.log(text, "warning")

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def sample(self, step: int, prompt: str, answer: str) -> None:
        pass

    def recall(self, digest: str, step: int) -> None:
        pass

    def write(self, lines: tuple[str, ...], summary: Mapping[str, Any], last: bool) -> str:
        return ""

    def close(self, lines: tuple[str, ...], summary: Mapping[str, Any]) -> None:
        pass


class Report:
    """Events go out at once; what was told is kept for the files. Any thread may tell; one at a time may `write`."""

    def __init__(self, order: TrainRun, attempt: Attempt, workdir: Path) -> None:
        self._order = order
        self._attempt = attempt
        self._folder = workdir / "report"
        self._metrics: list[Event] = []
        self._samples: list[Event] = []
        self._logs: list[str] = []
        self._drawn, self._drawing_s = time.monotonic(), FIRST_DRAWING_S
        config = {key: _value(order.config, key) for key in keys(order.config)}
        # Not in the report's folder: their files change while checkpoints are stored.
        self._theirs = workdir / "trackers"
        self._trackers = Trackers(order.config.report.trackers, order.job, config, self._theirs, self.warn)

    def log(self, text: str, level: str = "info") -> None:
        self._attempt.emit("log", level=level, text=text)
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._logs.append(f"{at} attempt {self._attempt.number} {level.upper()} {text}\n")

    def warn(self, text: str) -> None:
        self.log(text, "warning")

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        self._attempt.emit("metric", step=step, values=values)
        self._metrics.append({"time": time.time(), "step": step, "values": values})
        self._trackers.log(step, values)

    def sample(self, step: int, prompt: str, answer: str) -> None:
        told = {"step": step, "prompt": prompt, "answer": answer}
        self._attempt.emit("sample", **told)
        self._samples.append({"time": time.time(), **told})

    def recall(self, digest: str, step: int) -> None:
        """Take over what an earlier attempt told up to `step`."""
        store, place = self._attempt.store, self._folder.with_name("report-before")
        materialise(store, load(store, digest), place, _TAKEN_OVER)
        metrics = gzip.decompress((place / "metrics.jsonl.gz").read_bytes()).decode()
        self._metrics[:0] = _upto(step, metrics)
        self._samples[:0] = _upto(step, (place / "samples.jsonl").read_text("utf-8"))
        self._logs[:0] = (place / "logs/rank-0.txt").read_text("utf-8").splitlines(keepends=True)
        shutil.rmtree(place)

    def write(self, lines: Iterable[str], summary: Mapping[str, Any], last: bool) -> str:
        """Store the report with a step log of these lines; its digest."""
        metrics, samples, folder = list(self._metrics), list(self._samples), self._folder
        lines = tuple(lines)
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        write_log(lines, folder / NAME)
        (folder / "metrics.jsonl.gz").write_bytes(gzip.compress(_lines(metrics).encode(), mtime=0))
        (folder / "samples.jsonl").write_text(_lines(samples), "utf-8")
        (folder / "logs/rank-0.txt").write_text("".join(list(self._logs)), "utf-8")
        (folder / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        if lines and (last or self._drawing_s <= DRAW_SHARE * (time.monotonic() - self._drawn)):
            began = time.monotonic()
            try:
                self._draw([json.loads(line) for line in lines], metrics, samples)
            except Exception as error:  # no run ends for a picture
                self.warn(f"the curves could not be drawn: {error}")
            self._drawn = time.monotonic()
            self._drawing_s = self._drawn - began
        return publish_directory(self._attempt.store, "report", folder)

    def close(self, lines: Iterable[str], summary: Mapping[str, Any]) -> None:
        """Store the report of the end and tell of it."""
        self._trackers.close(summary["state"] == "SUCCEEDED")
        if self._theirs.exists():
            shutil.copytree(self._theirs, self._folder, dirs_exist_ok=True, ignore=_links)
        digest = self.write(lines, summary, last=summary["state"] != "CANCELLED" or len(self._metrics) < QUICK)
        self._attempt.emit("report", digest=digest)

    def _draw(self, steps: list[dict[str, Any]], metrics: list[Event], samples: list[Event]) -> None:
        looked = [(e["step"], e["values"]["validation_loss"]) for e in metrics if "validation_loss" in e["values"]]
        losses, rates = ([(s["step"], s[name]) for s in steps] for name in ("loss", "lr"))
        draw_losses(self._folder / "loss.png", self._order.job.rpartition("/")[2], losses, looked, rates)
        write_tensorboard(self._folder / "tensorboard", metrics, samples)


def _links(folder: str, names: list[str]) -> list[str]:
    """W&B's latest-run is its run once more."""
    return [name for name in names if (Path(folder) / name).is_symlink()]


def _lines(events: list[Event]) -> str:
    return "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events)


def _upto(step: int, text: str) -> list[Event]:
    return [event for line in text.splitlines() if (event := json.loads(line))["step"] <= step]


def _value(config: Any, key: str) -> float | str:
    value = to_json(config)
    for part in key.split("."):
        value = value[part]
    return value if isinstance(value, int | float | str) else json.dumps(value)
