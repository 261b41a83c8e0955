"""The database, on SQLite and on PostgreSQL."""

from __future__ import annotations

import multiprocessing
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from services.common.records import Record, Records
from services.finetune.errors import Aborted, AlreadyExists, InvalidArgument, QuartetError, Unavailable

A = Record("workspaces/w/trainingJobs/a", "trainingJob", "QUEUED", {"n": 1, "text": "ü\n"})


@pytest.fixture()
def records(database_url: str) -> Iterator[Records]:
    made = Records(database_url)
    yield made
    made.close()


def reason(call: object) -> str:
    with pytest.raises(QuartetError) as caught:
        call()  # type: ignore[operator]
    return caught.value.reason


def test_round_trip(records: Records) -> None:
    assert records.get(A.name) is None
    made = records.create(A, new_events=[{"type": "state"}])
    assert records.get(A.name) == made == A
    assert records.events(A.name, 0) == [(1, {"type": "state"})]


def test_name_taken_leaves_no_event(records: Records) -> None:
    records.create(A, new_events=[{"n": 1}])
    with pytest.raises(AlreadyExists):
        records.create(A, "another", "x", [{"n": 2}])
    assert [event for _, event in records.events(A.name, 0)] == [{"n": 1}]


def test_request_id(records: Records) -> None:
    made = records.create(A, "id", "body", [{"n": 1}])
    again = replace(A, name=A.name + "2")
    assert records.create(again, "id", "body", [{"n": 1}]) == made
    assert records.requested("trainingJob", "id", "body") == made
    assert records.requested("trainingJob", "", "") is None
    assert records.requested("conversionJob", "id", "other kind") is None
    assert reason(lambda: records.create(again, "id", "other")) == "REQUEST_ID_REUSED"
    assert reason(lambda: records.requested("trainingJob", "id", "other")) == "REQUEST_ID_REUSED"
    assert records.get(again.name) is None


def test_one_request_from_many_threads_makes_one(records: Records) -> None:
    def create(n: int) -> Record:
        return records.create(replace(A, name=f"{A.name}{n}"), "same", "body", [{"n": n}])

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(create, range(16)))
    assert len({record.name for record in made}) == 1
    assert len(records.find("trainingJob")) == 1
    assert len(records.events(made[0].name, 0)) == 1


def test_stale_write_changes_nothing(records: Records) -> None:
    first = records.create(A)
    second = records.update(replace(first, state="RUNNING"), [{"n": 1}])
    assert second.etag != first.etag
    with pytest.raises(Aborted) as caught:
        records.update(replace(first, state="FAILED"), [{"n": 2}])
    assert caught.value.reason == "ETAG_MISMATCH"
    assert records.get(A.name) == second
    assert records.events(A.name, 0) == [(1, {"n": 1})]


def test_racing_writers_leave_no_gap(records: Records) -> None:
    records.create(A)

    def write(n: int) -> int:
        while True:
            job = records.get(A.name)
            assert job is not None
            try:
                records.update(job, [{"by": n, "k": k} for k in range(3)])
                return n
            except Aborted:
                continue

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(12)))
    events = records.events(A.name, 0)
    assert [sequence for sequence, _ in events] == list(range(1, 37))
    assert [event["k"] for _, event in events] == [0, 1, 2] * 12
    job = records.get(A.name)
    assert job is not None and job.version == 13


def test_events_after_and_limit(records: Records) -> None:
    records.update(records.create(A), [{"n": n} for n in range(1, 8)])
    assert [s for s, _ in records.events(A.name, 5)] == [6, 7]
    assert [s for s, _ in records.events(A.name, 2, limit=3)] == [3, 4, 5]
    assert records.events(A.name, 2**62) == []


def test_find(records: Records) -> None:
    for n, (kind, state) in enumerate([("a", "X"), ("b", "X"), ("a", "Y"), ("a", "X")]):
        records.create(Record(f"workspaces/w_{n % 2}/{n}", kind, state, {}, create_time=f"2026-01-0{9 - n}T00:00:00Z"))
    assert [r.name[-1] for r in records.find("a")] == ["3", "2", "0"]
    assert [r.name[-1] for r in records.find("a", states=("X",))] == ["3", "0"]
    assert [r.name[-1] for r in records.find("a", prefix="workspaces/w_0/")] == ["2", "0"]
    assert records.find("a", prefix="workspaces/w%") == []


def test_delete(records: Records) -> None:
    made = records.update(records.create(A, "id", "body"), [{"n": 1}])
    with pytest.raises(Aborted):
        records.delete(A.name, "1")
    assert records.get(A.name) == made and len(records.events(A.name, 0)) == 1
    assert records.delete(A.name, made.etag) is True
    assert records.delete(A.name) is False
    assert records.get(A.name) is None and records.events(A.name, 0) == []


def _open(url: str) -> str:
    try:
        Records(url).close()
    except QuartetError as error:
        return error.message
    return ""


def test_services_start_at_once(database_url: str) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(_open, [database_url] * 8, chunksize=1) == [""] * 8


def test_sqlite_is_durable(sqlite_url: str, tmp_path: Path) -> None:
    records = Records(sqlite_url)
    with records._begin() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert int(db.exec_driver_sql("PRAGMA busy_timeout").scalar() or 0) >= 5000
    records.close()


def test_sqlite_waits_for_another_writer(sqlite_url: str, tmp_path: Path) -> None:
    records = Records(sqlite_url)
    other = sqlite3.connect(tmp_path / "test.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(records.create, A)
        assert not waiting.done()
        other.execute("COMMIT")
        assert waiting.result(timeout=10) == A
    other.close()
    records.close()


def test_database_away() -> None:
    with pytest.raises(Unavailable) as caught:
        Records("sqlite:////no/such/folder/x.db")
    assert caught.value.reason == "DATABASE_UNAVAILABLE"
    with pytest.raises(Unavailable):
        Records("postgresql+psycopg://nobody@127.0.0.1:1/x?connect_timeout=2")
    for url in ("nonsense", "nosuch://x"):
        with pytest.raises(InvalidArgument) as refused:
            Records(url)
        assert refused.value.reason == "SETTING_INVALID"


def test_postgresql_reconnects(records: Records) -> None:
    if records._engine.dialect.name != "postgresql":
        pytest.skip("only a server can drop connections")
    records.create(A)
    other = Records(records._engine.url.render_as_string(hide_password=False))
    with other._begin() as db:
        ours = "datname = current_database() AND pid <> pg_backend_pid()"
        cut = db.exec_driver_sql(f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE {ours}")
        assert cut.scalar()
    other.close()
    assert records.get(A.name) == A
