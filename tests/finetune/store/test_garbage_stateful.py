"""Writers, deleters, holders and the collector, each cut into its steps and mixed at random: nothing live is ever lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from services.finetune.errors import InvalidArgument
from services.finetune.store import file, garbage, open_store
from services.finetune.store.artifacts import File, Manifest, Parent, delete_ref, get_ref, load, publish, put_ref
from services.finetune.store.checks import TOUCH_AFTER_S
from services.finetune.store.garbage import GRACE_S, LEAST_GRACE_S, collect
from services.finetune.store.holds import hold, release

WORDS = st.sampled_from("abcde")
Writer = tuple[str, str, str]
"""(its place, what it did last, the digest of that)"""
NAMES = st.sampled_from(["workspaces/w/models/m", "workspaces/w/models/n"])


class Library(RuleBasedStateMachine):
    """Few words and names, so that equal blobs are stored, forgotten and stored again. Time passes by making all files
    older, and only while nobody is at work: a grace is longer than any work."""

    writers = Bundle("writers")
    holders = Bundle("holders")
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.store = open_store(self.home.as_uri())
        self.at_work = self.begun = 0
        self.collector: Iterator[Any] | None = None
        self.needed: dict[str, str] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    # A writer stores its blobs, publishes, and binds a name.

    @rule(target=writers, word=WORDS)
    def store_a_blob(self, word: str) -> Writer:
        self.at_work += 1
        self.begun += 1
        return f"w.conversionJobs.{self.begun}.x", "stored", self.store.put_blob(word.encode()).digest

    @rule(target=writers, writer=consumes(writers), base=st.none() | NAMES)
    def publish(self, writer: Writer, base: str | None) -> Writer:
        place, step, digest = writer
        if step == "published":
            return writer
        ref = get_ref(self.store, base) if base else None
        parents = (Parent("base", ref.body["digest"]),) if ref else ()
        kind: Any = "adapter" if ref else "base"
        if ref is not None:  # as a job does that trains on it
            hold(self.store, place, "job", [ref.body["digest"]])
            if get_ref(self.store, ref.name) is None:
                kind, parents = "base", ()
        return place, "published", publish(self.store, Manifest(kind, (File("f", digest, 1),), parents))

    @rule(writer=consumes(writers), name=NAMES)
    def bind_a_name(self, writer: Writer, name: str) -> None:
        self.at_work -= 1
        place, step, digest = writer
        if step == "published":
            put_ref(self.store, name, {"digest": digest})
            release(self.store, place)

    @rule(writer=consumes(writers))
    def a_writer_dies(self, writer: Writer) -> None:
        self.at_work -= 1
        release(self.store, writer[0])

    # A deleter, by force.

    @rule(name=NAMES)
    def delete_a_name(self, name: str) -> None:
        delete_ref(self.store, name)

    # A holder finds a name, holds what it stands for, and looks again.

    @rule(target=holders, name=NAMES)
    def find(self, name: str) -> tuple[str, str]:
        ref = get_ref(self.store, name)
        return name, ref.body["digest"] if ref else ""

    @rule(target=held, holder=consumes(holders))
    def hold(self, holder: tuple[str, str]) -> str:
        name, digest = holder
        if not digest:
            return ""
        place = f"w.endpoints.{len(self.needed)}.x"
        hold(self.store, place, "endpoint", [digest])
        ref = get_ref(self.store, name)
        if ref is None or ref.body["digest"] != digest:
            release(self.store, place)
            return ""
        self.needed[place] = digest
        return place

    @rule(place=consumes(held))
    def let_go(self, place: str) -> None:
        if place:
            self.needed.pop(place)
            release(self.store, place)

    # The collector.

    @precondition(lambda self: self.collector is None)
    @rule()
    def begin_to_collect(self) -> None:
        self.collector = collect(self.store, GRACE_S, False)
        next(self.collector)

    @precondition(lambda self: self.collector is not None)
    @rule(steps=st.integers(1, 3))
    def collect_on(self, steps: int) -> None:
        for _ in range(steps):
            if self.collector is not None and next(self.collector).phase == "DONE":
                self.collector = None

    @precondition(lambda self: self.collector is not None)
    @rule()
    def the_collector_is_killed(self) -> None:
        self.collector = None

    @precondition(lambda self: self.collector is None and not self.at_work)
    @rule(hours=st.sampled_from([1, 25]))
    def time_passes(self, hours: int) -> None:
        for path in self.home.rglob("*"):
            stat = path.stat()
            os.utime(path, (stat.st_atime, stat.st_mtime - hours * 3600))

    # What must hold at any moment.

    @invariant()
    def all_that_is_needed_is_there(self) -> None:
        refs = [get_ref(self.store, f"workspaces/w/models/{m}") for m in "mn"]
        left = [ref.body["digest"] for ref in refs if ref] + list(self.needed.values())
        while left:
            manifest = load(self.store, left.pop())
            for f in manifest.files:
                assert self.store.stat_blob(f.digest) is not None, f
            left += [p.digest for p in manifest.parents if manifest.kind == "adapter"]


def test_nothing_live_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "BATCH", 1)
    assert TOUCH_AFTER_S < LEAST_GRACE_S / 2
    Library.TestCase.settings = settings(
        max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    Library.TestCase().runTest()


@pytest.mark.parametrize("touches", [True, False])
def test_it_is_touching_that_saves_a_blob_found_again(monkeypatch: pytest.MonkeyPatch, touches: bool) -> None:
    """Garbage is stored again while it is collected: without touches the machine above meets the loss."""
    if not touches:
        monkeypatch.setattr(file, "TOUCH_AFTER_S", 1e12)
    library = Library()
    library.a_writer_dies(library.store_a_blob("a"))
    library.time_passes(25)
    library.begin_to_collect()
    writer = library.store_a_blob("a")
    while library.collector is not None:
        library.collect_on(1)
    with contextlib.nullcontext() if touches else pytest.raises(InvalidArgument):
        library.bind_a_name(library.publish(writer, None), "workspaces/w/models/m")
        library.all_that_is_needed_is_there()
    library.teardown()
