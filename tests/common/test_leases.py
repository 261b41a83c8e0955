"""Which of several replicas does what must be done once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.common.jobs import Jobs
from services.common.launchers import ONE, Handle, Shape
from services.common.leases import Lease
from services.common.records import Records
from services.finetune.errors import Unavailable
from services.finetune.store import Store
from tests.common.jobbing import NAME, SIMPLE, ScriptLauncher, check_history, make, queue


@pytest.fixture()
def records(fresh_postgres: str) -> Iterator[Records]:
    made = Records(fresh_postgres)
    yield made
    made.close()


@pytest.fixture()
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.leases.LEASE_S", 0.6)
    monkeypatch.setattr("services.common.leases.ASK_S", 0.02)


def eventually(lease: Lease, limit_s: float = 20) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if lease.held():
            return True
        time.sleep(0.01)
    return False


def test_one_of_many_has_it_from_the_first_moment(records: Records) -> None:
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda n: records.hold("jobs", str(n), 60), range(8)))
    assert got.count(True) == 1
    holder = str(got.index(True))
    assert records.hold("jobs", holder, 60) and not records.hold("jobs", "another", 60)
    assert records.hold("endpoints", "another", 60), "leases of other names are others"


def test_it_passes_on_when_its_holder_is_gone_or_gives_it_back(records: Records, quick: None) -> None:
    first, second = Lease(records, "jobs"), Lease(records, "jobs")
    assert first.held() and not second.held()
    # The first is never heard of again.
    assert eventually(second) and not Lease(records, "jobs").held()
    second.release()
    assert not second.held(), "who left does not come back"
    assert Lease(records, "jobs").held()


def test_who_keeps_asking_keeps_it(records: Records, quick: None) -> None:
    first, second = Lease(records, "jobs"), Lease(records, "jobs")
    assert first.held()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        # On a machine that stood still for longer than a lease runs, the second has it, and never both.
        assert not (first.held() and second.held())
        time.sleep(0.01)


def test_nobody_leads_while_the_database_is_away(records: Records, quick: None) -> None:
    lease = Lease(records, "jobs")
    assert lease.held()
    broken = Records("sqlite://")
    lease._records = broken
    broken.hold = lambda *_: (_ for _ in ()).throw(Unavailable("away", reason="DATABASE_UNAVAILABLE"))  # type: ignore[method-assign]
    time.sleep(0.3)
    with pytest.raises(Unavailable):
        lease.held()
    assert lease._held is False


def test_a_sqlite_file_has_one_service(sqlite_url: str) -> None:
    first, second = (Lease(Records(sqlite_url), "jobs") for _ in range(2))
    assert first.held() and second.held()


class Slow(ScriptLauncher):
    """Takes as long to start a worker as an API server with much to do: another supervisor may come in between."""

    def launch(self, command: Sequence[str], name: str, env: Mapping[str, str], shape: Shape = ONE) -> Handle:
        time.sleep(0.5)
        return super().launch(command, name, env, shape)


def supervised(jobs: Jobs, home: Path) -> Jobs:
    jobs.supervisor.launcher = Slow(home)
    jobs.start()
    return jobs


def test_two_supervisors_run_each_job_once(fresh_postgres: str, file_store: Store, tmp_path: Path) -> None:
    """More jobs than one may run at once, and a second replica that could take what the first has just begun."""
    running = [supervised(make(fresh_postgres, file_store, tmp_path, max_workers=2), tmp_path) for _ in range(2)]
    names = [f"{NAME}{n}" for n in range(4)]
    try:
        for n, name in enumerate(names):
            queue(running[n % 2], SIMPLE, name)
        deadline = time.monotonic() + 60
        while any(running[0].get(name).state != "SUCCEEDED" for name in names):
            assert time.monotonic() < deadline, [running[0].get(name) for name in names]
            time.sleep(0.05)
    finally:
        for jobs in running:
            jobs.stop()
    running[1].records.close()
    assert [running[0].get(name).body["attempt"] for name in names] == [1] * 4
    assert len(list((tmp_path / "logs").iterdir())) == 4, "a worker too many was started"
    for name in names:
        check_history(running[0], name, 5)
    running[0].records.close()
