"""Errors of a real server become one line, our classes, and the exit status of services/finetune/errors.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status
from quartet.datasets.v1 import datasets_pb2, datasets_pb2_grpc
from quartet.training.v1 import training_pb2, training_pb2_grpc

from services.client import Client
from services.common.status import to_status
from services.finetune.errors import BY_CODE, NotFound, QuartetError, Unavailable, Violation
from tests.client.conftest import Quartet, serving

TOKEN = "0123456789abcdef-secret"


def abort(context: Any, error: QuartetError) -> None:
    context.abort_with_status(rpc_status.to_status(to_status(error)))


class Datasets(datasets_pb2_grpc.DatasetsServicer):
    """Fails as told, then answers; remembers what it was asked."""

    def __init__(self, error: QuartetError | None = None, times: int = 1 << 30) -> None:
        self.error, self.times = error, times
        self.asked: list[Any] = []
        self.tokens: list[str] = []

    def _refuse(self, request: Any, context: Any) -> None:
        self.asked.append(request)
        self.tokens += [str(v) for k, v in context.invocation_metadata() if k == "authorization"]
        if self.error is not None and self.times > 0:
            self.times -= 1
            abort(context, self.error)

    def ListDatasets(self, request: Any, context: Any) -> Any:
        self._refuse(request, context)
        first = 2 if not request.page_token else 4
        found = [datasets_pb2.Dataset(name=f"workspaces/default/datasets/d{n}") for n in (first, first + 1)]
        return datasets_pb2.ListDatasetsResponse(datasets=found, next_page_token="" if request.page_token else "more")

    def CreateDataset(self, request: Any, context: Any) -> Any:
        self._refuse(request, context)
        return datasets_pb2.Dataset(name="workspaces/default/datasets/d")


class Training(training_pb2_grpc.TrainingServicer):
    """Has one job that failed and one that never ends."""

    def GetTrainingJob(self, request: Any, context: Any) -> Any:
        if request.name.endswith("/failed"):
            error = to_status(NotFound("the hub has no such model", reason="MODEL_UNKNOWN"))
            return training_pb2.TrainingJob(name=request.name, state=training_pb2.TrainingJob.FAILED, error=error)
        return training_pb2.TrainingJob(name=request.name, state=training_pb2.TrainingJob.RUNNING)

    def WatchTrainingJob(self, request: Any, context: Any) -> Iterator[Any]:
        state = training_pb2.StateChange(state=training_pb2.TrainingJob.RUNNING)
        yield training_pb2.TrainingEvent(sequence=1, attempt=1, state=state)
        while context.is_active() and not request.name.endswith("/failed"):
            time.sleep(0.05)


# What these servicers leave out answers UNIMPLEMENTED, as gRPC has it.


def datasets(error: QuartetError | None = None, times: int = 1 << 30) -> Datasets:
    return Datasets(error, times)  # type: ignore[abstract]


def training(server: grpc.Server) -> None:
    training_pb2_grpc.add_TrainingServicer_to_server(Training(), server)  # type: ignore[abstract]


@pytest.mark.parametrize("code", BY_CODE)
def test_every_class_arrives_with_its_exit_status(quartet: Quartet, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.client.retry.pause_s", lambda attempt: 0.0)
    cls = BY_CODE[code]
    servicer = datasets(cls("it is so", reason="SOME_REASON", metadata={"k": "v"}))
    with serving(lambda s: datasets_pb2_grpc.add_DatasetsServicer_to_server(servicer, s)) as address:
        done = quartet("dataset", "list", "--endpoint", address, "--json")
        assert (done.status, done.err) == (cls.exit_status, "error: it is so\n")
        told = done.json["error"]
        assert (told["code"], told["reason"], told["metadata"]) == (code, "SOME_REASON", {"k": "v"})
        with Client(address) as client, pytest.raises(cls):
            client.datasets.ListDatasets(datasets_pb2.ListDatasetsRequest())


def test_violations_are_shown_and_counted(quartet: Quartet) -> None:
    violations = [Violation(f"files[a.jsonl].rows[{n}].output", "is missing " + "x" * 200) for n in range(100)]
    error = BY_CODE["INVALID_ARGUMENT"](
        "bad rows", reason="ROWS_INVALID", metadata={"bad_rows": "312"}, violations=violations
    )
    servicer = datasets(error)
    with serving(lambda s: datasets_pb2_grpc.add_DatasetsServicer_to_server(servicer, s)) as address:
        done = quartet("dataset", "list", "--endpoint", address)
        assert done.status == 65
        lines = done.err.splitlines()
        assert lines[1].startswith("  files[a.jsonl].rows[0].output: is missing")
        assert len(lines) == 22 and lines[-1] == "  … and 292 more"
        with Client(address) as client, pytest.raises(QuartetError) as caught:
            client.datasets.ListDatasets(datasets_pb2.ListDatasetsRequest())
        assert len(caught.value.violations) == 100


def test_unavailable_is_tried_again_with_the_same_request_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.client.retry.pause_s", lambda attempt: 0.01)
    servicer = datasets(Unavailable("the store is away", reason="STORE_UNREACHABLE"), times=3)
    request = datasets_pb2.CreateDatasetRequest(parent="workspaces/default", request_id="one")
    with (
        serving(lambda s: datasets_pb2_grpc.add_DatasetsServicer_to_server(servicer, s)) as address,
        Client(address) as client,
    ):
        assert client.datasets.CreateDataset(request).name.endswith("/d")
    assert [r.request_id for r in servicer.asked] == ["one"] * 4


@pytest.mark.parametrize("refused", [False, True])
def test_one_that_answered_before_is_waited_for(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is being replaced, or comes back: not what a person forgot to start. A refusal is an answer too."""
    monkeypatch.setattr("services.client.retry.pause_s", lambda attempt: 0.01)
    request = datasets_pb2.CreateDatasetRequest(parent="workspaces/default")
    servicer = datasets(NotFound("no such workspace", reason="WORKSPACE_NOT_FOUND"), times=int(refused))

    def add(server: grpc.Server) -> None:
        datasets_pb2_grpc.add_DatasetsServicer_to_server(servicer, server)

    with serving(add) as address, Client(address) as client:
        with pytest.raises(NotFound) if refused else contextlib.nullcontext():
            client.datasets.CreateDataset(request)
        servicer.error, servicer.times = Unavailable("the store is away", reason="STORE_UNREACHABLE"), 12
        assert client.datasets.CreateDataset(request).name.endswith("/d")
        assert len(servicer.asked) == 14
        monkeypatch.setattr("services.client.retry.AWAY_S", 0.2)
        servicer.times = 1 << 30
        with pytest.raises(Unavailable):
            client.datasets.CreateDataset(request)


def test_lists_follow_their_pages(quartet: Quartet) -> None:
    with serving(lambda s: datasets_pb2_grpc.add_DatasetsServicer_to_server(datasets(), s)) as address:
        done = quartet("dataset", "list", "--endpoint", address, "--json")
    assert [d["name"][-2:] for d in done.json["datasets"]] == ["d2", "d3", "d4", "d5"]


def test_nobody_listens(quartet: Quartet, tmp_path: Path) -> None:
    for address in ("127.0.0.1:1", f"unix:{tmp_path}/none"):
        done = quartet("dataset", "list", "--endpoint", address)
        assert done.status == 69
        assert done.err.startswith(f"error: no Quartet at {address}; start one with `quartet up`")


def test_the_flag_wins_over_the_variables(quartet: Quartet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    servicer = datasets()
    secret = tmp_path / "token"
    secret.write_text(TOKEN)
    monkeypatch.setenv("QUARTET_ENDPOINT", "127.0.0.1:1")
    with serving(lambda s: datasets_pb2_grpc.add_DatasetsServicer_to_server(servicer, s)) as address:
        monkeypatch.setenv("QUARTET_DATASETS_ENDPOINT", address)
        assert quartet("dataset", "list", "--token-file", str(secret)).status == 0
        monkeypatch.setenv("QUARTET_DATASETS_ENDPOINT", "127.0.0.1:2")
        assert quartet("dataset", "list", "--endpoint", address).status == 0
        assert "127.0.0.1:2" in quartet("dataset", "list").err
    assert set(servicer.tokens) == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "words", [["--token-file", "/none"], ["--tls-ca", "/none"], ["--tls-cert", "/none"], ["--tls-key", "/none"]]
)
def test_files_that_are_not_there(quartet: Quartet, words: list[str]) -> None:
    done = quartet("dataset", "list", *words)
    assert done.status in (65, 78) and done.err.startswith("error: ") and done.err.count("\n") == 1


def test_a_failed_job_is_the_commands_failure(quartet: Quartet) -> None:
    with serving(training) as address:
        done = quartet("job", "watch", "failed", "--endpoint", address)
        assert (done.status, done.out, done.err) == (66, "RUNNING\n", "error: the hub has no such model\n")
        events = quartet("job", "watch", "failed", "--endpoint", address, "--json")
        assert events.status == 66 and events.json["state"]["state"] == "RUNNING"
        told = quartet("job", "get", "failed", "--endpoint", address, "--json").json
    assert told["state"] == "FAILED" and told["error"]["details"][0]["reason"] == "MODEL_UNKNOWN"


def test_logs_of_a_live_job_end(quartet: Quartet) -> None:
    with serving(training) as address:
        done = quartet("job", "logs", "endless", "--endpoint", address, "--json")
    assert done.status == 0 and done.json["sequence"] == 1


def test_interrupt_lets_go_and_says_how_to_come_back() -> None:
    with serving(training) as address:
        command = [sys.executable, "-m", "services.client", "job", "watch", "endless", "--endpoint", address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
        assert process.stdout is not None and process.stdout.readline() == "RUNNING\n"
        told = ""
        # Python drops an interrupt that meets it in a destructor; whoever waits presses the keys again.
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, told = process.communicate(timeout=20)
                break
    assert process.returncode == 130
    assert "come back with: quartet job watch workspaces/default/trainingJobs/endless" in told
    assert "Traceback" not in told
