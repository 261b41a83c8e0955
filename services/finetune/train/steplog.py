"""The step log: what decides a run and shows it, step by step, small enough to go with every checkpoint.

steps.jsonl.gz has a line for each optimizer step, from the first:

    {"step": 1, "blocks": [7, 0, …], "lr": 1e-4, "grad_norm": 0.5, "loss": 2.1, "tokens": 512, "learned": 128}

`blocks` are numbers of packed blocks in the order of their reading, floats are written so that they read back the same,
and no time is in it: equal runs write equal bytes.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.finetune.errors import DataLoss
from services.finetune.progress import Attempt, read_back
from services.finetune.train.step import Told

NAME = "steps.jsonl.gz"
COMPARED = ("blocks", "lr", "grad_norm", "loss", "tokens", "learned")


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two runs part: the first step that is not the same, and what differs in it."""

    step: int
    name: str
    """Of the first value that differs; "step" where one of the logs has none."""
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"step {self.step}: {self.name} {self.ours!r}, before {self.theirs!r}"


class StepLog:
    """The log of a run; a resumed one goes on with the lines up to where it resumes, so each step is in it once."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._lines = list(lines)

    def add(self, told: Told) -> None:
        taken = told.taken
        line = {"step": told.step, "blocks": taken.blocks, "lr": told.lr, "grad_norm": told.grad_norm}
        line |= {"loss": told.loss, "tokens": taken.tokens, "learned": taken.learned}
        self._lines.append(json.dumps(line, separators=(",", ":")))

    def upto(self) -> tuple[str, ...]:
        """The lines so far, to be written while others are added."""
        return tuple(self._lines)


def write_log(lines: Sequence[str], path: Path) -> None:
    # A name or a time in the header would make equal logs differ.
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps of a log. DataLoss (STEP_LOG_CORRUPT)."""
    try:
        return [json.loads(line) for line in read_lines(path)]
    except (OSError, EOFError, ValueError) as error:
        raise DataLoss(f"{path.name} is no step log: {error}", reason="STEP_LOG_CORRUPT") from error


def read_lines(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()


def first_difference(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Difference | None:
    """Where two logs first differ, to the last bit; None if they are the same."""
    for a, b in itertools.zip_longest(ours, theirs):
        if a is None or b is None:
            step = (a or b)["step"]
            return Difference(step, "step", a and a["step"], b and b["step"])
        for name in ("step", *COMPARED):
            if a[name] != b[name]:
                return Difference(a["step"], name, a[name], b[name])
    return None


class Replay:
    """Steps that an earlier attempt had taken, and that were lost with it, against the same steps taken again."""

    def __init__(self, before: Mapping[int, Mapping[str, float]] | None = None) -> None:
        self._before = dict(before or {})
        self.steps = 0
        """So many were compared."""
        self.parted: Difference | None = None

    @classmethod
    def of(cls, attempt: Attempt, step: int) -> Replay:
        """What the attempt before told of the steps after `step`."""
        before: dict[int, Mapping[str, float]] = {}
        for event in read_back(attempt.store, attempt.job_key, attempt.number - 1):
            if event["type"] == "metric" and "loss" in event["values"]:
                if event["step"] <= step:
                    break
                before[event["step"]] = event["values"]
        return cls(before)

    def add(self, told: Told) -> Difference | None:
        """The first difference, when this step is it."""
        before = self._before.pop(told.step, None)
        if before is None or self.parted is not None:
            return None
        self.steps += 1
        for name in ("lr", "loss", "grad_norm"):
            ours = getattr(told, name)
            if ours != before[name]:
                self.parted = Difference(told.step, name, ours, before[name])
                return self.parted
        return None
