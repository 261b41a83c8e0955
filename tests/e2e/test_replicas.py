"""Two replicas of each service on one PostgreSQL and one S3 store: work is done once, and one may die at any time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.common.records import Records
from tests.common.databases import postgres
from tests.tiny import tiny_model

ROOMS = ("datasets", "training", "conversion", "inference")
pytestmark = pytest.mark.slow


@dataclass
class Pair:
    """Two processes of one service."""

    room: str
    folder: Path
    flags: list[str]

    def start(self) -> None:
        self.processes = []
        for n in range(2):
            home = self.folder / f"{self.room}-{n}"
            home.mkdir()
            command = [sys.executable, "-m", f"services.{self.room}", "--home", str(home), "--port", "0"]
            command += ["--address-file", str(home / "address"), *self.flags]
            with (home / "log").open("wb") as log:
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log))

    def addresses(self) -> str:
        """Once both serve, as a client takes them."""
        files = [self.folder / f"{self.room}-{n}" / "address" for n in range(2)]
        deadline = time.monotonic() + 120
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline and not any(p.poll() for p in self.processes), self.logs()
            time.sleep(0.05)
        return ",".join(file.read_text() for file in files)

    def kill(self, n: int) -> None:
        self.processes[n].kill()
        self.processes[n].wait()

    def logs(self) -> str:
        return "".join((self.folder / f"{self.room}-{n}" / "log").read_text() for n in range(2))


@dataclass
class Place:
    pairs: Mapping[str, Pair]
    env: Mapping[str, str]
    records: Records
    tiny: str

    def begin(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "services.client", *words]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(self, begun: subprocess.Popen[str]) -> str:
        out, err = begun.communicate(timeout=400)
        logs = "".join(pair.logs()[-3000:] for pair in self.pairs.values()) if begun.returncode else ""
        assert begun.returncode == 0, (begun.args, out, err, logs)
        return out

    def quartet(self, *words: str) -> str:
        return self.end(self.begin(*words))

    def holder(self, kind: str) -> None:
        """Wait until a job of that kind is under way."""
        deadline = time.monotonic() + 120
        while not any(r.state == "RUNNING" for r in self.records.find(kind)):
            assert time.monotonic() < deadline, self.records.find(kind)
            time.sleep(0.05)


@pytest.fixture(scope="module")
def place(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    bucket, _, query = s3_server.partition("?")
    folder = tmp_path_factory.mktemp("replicas")
    tiny_model(folder / "tiny")
    with postgres() as url:
        flags = ["--store-uri", f"{bucket}/replicas?{query}", "--database-url", url]
        flags += ["--import-roots", str(folder / "tiny")]
        pairs = {room: Pair(room, folder, flags) for room in ROOMS}
        for pair in pairs.values():
            pair.start()
        env = {**os.environ, **{f"QUARTET_{r.upper()}_ENDPOINT": p.addresses() for r, p in pairs.items()}}
        records = Records(url)
        yield Place(pairs, env, records, str(folder / "tiny"))
        records.close()
        for pair in pairs.values():
            for process in pair.processes:
                process.terminate()
        for pair in pairs.values():
            assert {process.wait(timeout=60) for process in pair.processes} <= {0, -9}, pair.logs()


def test_the_main_job_with_a_replica_of_each_service_killed(place: Place, rows: Path) -> None:
    """Both replicas answer; the one that dies may be the one that supervises, and its job goes on as it was."""
    place.quartet("model", "import", place.tiny, "--name", "tiny")
    place.quartet("dataset", "create", "sums", str(rows))
    place.pairs["datasets"].kill(0)
    options = ["--cfg-options", "schedule.max_steps=40", "data.max_length=64", "lora.rank=2"]
    job = ["--base", "tiny", "--data", "sums"]
    for dies in range(2):
        # Whichever supervises: of two jobs one is surely cut off from its supervisor.
        training = place.begin("train", "smollm2_135m_qlora_assistant_e1", *job, "--name", f"job{dies}", *options)
        place.holder("trainingJob")
        if dies == 0:
            place.pairs["training"].kill(0)
        place.end(training)
    place.pairs["conversion"].kill(1)
    place.quartet("convert", "pth_to_hf", "job1", "tiny-adapter")
    place.quartet("convert", "merge", "tiny", "tiny-adapter", "tiny-merged")
    place.quartet("endpoint", "create", "tiny-merged", "--name", "live")
    place.pairs["inference"].kill(0)
    ask = ["-m", "What is 1 plus 1?", "--max-new-tokens", "4", "--temperature", "0"]
    assert place.quartet("chat", "live", *ask).strip()
    kinds = {m["name"].split("/")[-1] for m in json.loads(place.quartet("model", "list", "--json"))["models"]}
    assert kinds == {"tiny", "tiny-adapter", "tiny-merged"}
    place.quartet("endpoint", "delete", "live")
    for kind in ("trainingJob", "conversionJob"):
        done = place.records.find(kind)
        assert {(r.state, r.body["attempt"]) for r in done} == {("SUCCEEDED", 1)}, done
