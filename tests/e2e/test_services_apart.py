"""Each service a process of its own, on PostgreSQL and an S3 store: as on a cluster, they share nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.common.databases import postgres
from tests.tiny import tiny_model

ROOMS = ("datasets", "training", "conversion", "inference")


def start(room: str, home: Path, *flags: str) -> subprocess.Popen[bytes]:
    home.mkdir()
    command = [sys.executable, "-m", f"services.{room}", "--home", str(home), "--host", f"unix:{home}/s"]
    with (home / "log").open("wb") as log:
        return subprocess.Popen([*command, "--address-file", str(home / "address"), *flags], stdout=log, stderr=log)


@pytest.fixture(scope="module")
def addresses(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """QUARTET_<ROOM>_ENDPOINT of four services; their homes are apart, so nothing passes through a folder."""
    bucket, _, query = s3_server.partition("?")
    folder = tmp_path_factory.mktemp("apart")
    tiny_model(folder / "tiny")
    with postgres() as url:
        shared = ["--store-uri", f"{bucket}/apart?{query}", "--database-url", url]
        shared += ["--import-roots", str(folder / "tiny")]
        running = {room: start(room, folder / room, *shared) for room in ROOMS}
        deadline = time.monotonic() + 60
        for room, process in running.items():
            while not (folder / room / "address").exists():
                assert process.poll() is None and time.monotonic() < deadline, (folder / room / "log").read_text()
                time.sleep(0.05)
        yield {"TINY": str(folder / "tiny"), **{f"QUARTET_{r.upper()}_ENDPOINT": f"unix:{folder}/{r}/s" for r in ROOMS}}
        for process in running.values():
            process.terminate()
        assert [process.wait(timeout=30) for process in running.values()] == [0, 0, 0, 0]


def test_the_main_job(addresses: Mapping[str, str], rows: Path) -> None:
    def quartet(*words: str) -> str:
        command = [sys.executable, "-m", "services.client", *words]
        done = subprocess.run(command, env={**os.environ, **addresses}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    quartet("model", "import", addresses["TINY"], "--name", "tiny")
    quartet("dataset", "create", "sums", str(rows))
    options = ["--cfg-options", "schedule.max_steps=2", "data.max_length=64", "lora.rank=2"]
    quartet("train", "smollm2_135m_qlora_assistant_e1", "--base", "tiny", "--data", "sums", "--name", "job", *options)
    quartet("convert", "pth_to_hf", "job", "tiny-adapter")
    quartet("convert", "merge", "tiny", "tiny-adapter", "tiny-merged")
    kinds = {m["name"].split("/")[-1]: m["kind"] for m in json.loads(quartet("model", "list", "--json"))["models"]}
    assert kinds == {"tiny": "BASE", "tiny-adapter": "ADAPTER", "tiny-merged": "MERGED"}
    quartet("endpoint", "create", "tiny", "--name", "live")
    told = json.loads(quartet("endpoint", "update", "live", "--adapter", "v1=tiny-adapter", "--json"))
    assert [a["alias"] for a in told["adapters"]] == ["v1"]
    assert "v1" not in quartet("endpoint", "update", "live", "--drop-adapter", "v1")
    quartet("endpoint", "delete", "live")
    ask = ["-m", "What is 1 plus 1?", "--max-new-tokens", "4", "--temperature", "0"]
    merged = quartet("chat", "tiny-merged", *ask)
    assert merged.strip() and merged == quartet("chat", "tiny-merged", *ask)
