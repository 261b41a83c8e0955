"""A job holds what its order names, from before it exists until it has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.common import holding
from services.common.jobs import Jobs
from services.common.launchers.local import LocalLauncher
from services.common.records import Records
from services.common.supervisor import Work
from services.finetune.errors import Aborted, AlreadyExists, NotFound
from services.finetune.store import Store, open_store
from services.finetune.store.holds import hold, list_holds
from tests.common.jobbing import ScriptLauncher, ended

NAME = "workspaces/w/trainingJobs/j"
BASE, REPORT = "sha256:" + "b" * 64, "sha256:" + "e" * 64


def spec(plan: list[list[Any]]) -> dict[str, Any]:
    return {"run": {"plan": plan, "base": {"name": "n", "digest": BASE}, "more": [{"digest": ""}]}}


def room(home: Path, store: Store, keeps: Any = lambda job: set(), launcher: LocalLauncher | None = None) -> Jobs:
    work = Work(
        "trainingJob", "train", lambda job: job.body["spec"]["run"], lambda job, r: {"step": r["step"]}, keeps=keeps
    )
    records = Records(f"sqlite:///{home}/q.db")
    return Jobs(records, store, launcher or ScriptLauncher(home), work, max_workers=1, grace_s=1)


@pytest.fixture()
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def held(store: Store) -> dict[str, set[str]]:
    return {h.holder: set(h.digests) for h in list_holds(store)}


def test_from_before_it_exists_until_it_ended(tmp_path: Path, store: Store) -> None:
    jobs = room(tmp_path, store)
    seen: list[Any] = []

    def again() -> Any:
        seen.append((held(store), jobs.records.get(NAME)))
        return spec([["end"]])["run"]

    jobs.create(NAME, spec([["end"]]), "r", "x", again=again)
    assert seen == [({NAME: {BASE}}, None)] and held(store) == {NAME: {BASE}}
    assert jobs.create(NAME, spec([["end"]]), "r", "x").name == NAME  # the same request again
    with pytest.raises(AlreadyExists):
        jobs.create(NAME, spec([["end"]]), "s", "y")
    assert len(list(list_holds(store))) == 1
    assert ended(jobs, NAME).state == "SUCCEEDED" and held(store) == {}


def test_what_is_gone_or_changed_makes_no_job(tmp_path: Path, store: Store) -> None:
    jobs = room(tmp_path, store)

    def gone() -> Any:
        raise NotFound("deleted meanwhile", reason="MODEL_NOT_FOUND")

    with pytest.raises(NotFound):
        jobs.create(NAME, spec([["end"]]), "", "", again=gone)
    with pytest.raises(Aborted, match="ask again"):
        jobs.create(NAME, spec([["end"]]), "", "", again=lambda: spec([["fail", "X"]])["run"])
    assert held(store) == {} and jobs.records.get(NAME) is None


def test_a_record_keeps_what_it_is_of_no_use_without(tmp_path: Path, store: Store) -> None:
    jobs = room(tmp_path, store, keeps=lambda job: {REPORT} if "step" in job.body else set())
    jobs.create(NAME, spec([["end"]]), "", "")
    ended(jobs, NAME)
    assert held(store) == {NAME: {REPORT}}
    jobs.delete(NAME, "")
    assert held(store) == {}


def test_a_start_mends_what_a_crash_left(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = room(tmp_path, store)
    made = jobs.create(NAME, spec([["sleep", 60]]), "", "")
    holding.let_go(store, made)  # as of a job that was made before there were holds
    hold(store, "w.trainingJobs.lost.0", "workspaces/w/trainingJobs/lost", [BASE])
    hold(store, "w.endpoints.e.0", "workspaces/w/endpoints/e", [BASE])
    holding.mend(store, jobs.records, "trainingJob", jobs.supervisor.needs)
    assert set(held(store)) == {NAME, "workspaces/w/trainingJobs/lost", "workspaces/w/endpoints/e"}
    monkeypatch.setattr(holding, "UNBORN_S", -1.0)
    holding.mend(store, jobs.records, "trainingJob", jobs.supervisor.needs)
    assert set(held(store)) == {NAME, "workspaces/w/endpoints/e"}
    jobs.cancel(NAME)
    ended(jobs, NAME)
    assert set(held(store)) == {"workspaces/w/endpoints/e"}
