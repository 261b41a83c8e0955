"""What a user gets for each mistake: one clear line, the right exit status, nothing half-made, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.stack import Stack

GOOD = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]}\n'
EMPTY = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}\n'
NO_CONTENT = '{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}\n'
UNKNOWN = '{"foo": 1, "bar": 2}\n'

ROWS = [
    ("broken JSON", (GOOD + '{"messages": [\n').encode(), ["rows[2]"]),
    ("missing field", (GOOD + GOOD + NO_CONTENT).encode(), ["rows[3].messages[0].content"]),
    ("empty answer", (GOOD + EMPTY).encode(), ["rows[2].messages[1].content"]),
    ("wrong encoding", GOOD.encode() + '{"messages": "é"}\n'.encode("latin-1"), ["rows[2]", "UTF-8"]),
    ("unknown format", UNKNOWN.encode(), ["foo", "openai"]),
    ("no rows", b"", ["row"]),
]


def refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.mark.parametrize(("case", "data", "words"), ROWS, ids=[case for case, _, _ in ROWS])
def test_bad_rows_are_blamed(stack: Stack, tmp_path: Path, case: str, data: bytes, words: list[str]) -> None:
    name = "bad-" + case.lower().replace(" ", "-")
    (tmp_path / "a.jsonl").write_bytes(data)
    done = stack.quartet("dataset", "create", name, str(tmp_path / "a.jsonl"))
    refused(done, 65, *words)
    listed = json.loads(stack.quartet("dataset", "list", "--json").stdout)
    latest = {d["name"].split("/")[-1]: d.get("latest_revision", "") for d in listed["datasets"]}
    assert not latest.get(name)


def test_unknown_things_name_the_nearest(stack: Stack, rows: Path) -> None:
    assert stack.quartet("dataset", "create", "good", str(rows)).returncode == 0
    recipe = "smollm2_135m_qlora_assistant_e1"
    train = ["train", recipe, "--base", "smollm2", "--data", "good"]
    key = stack.quartet(*train, "--cfg-options", "optim.lrr=1")
    refused(key, 65, "optim.lrr", "optim.lr")
    value = stack.quartet(*train, "--cfg-options", "schedule.epochs=many")
    refused(value, 65, "schedule.epochs", "whole number")
    name = stack.quartet("train", recipe.replace("assistant", "asistant"), "--base", "smollm2", "--data", "good")
    refused(name, 66, recipe)
    refused(stack.quartet("train", recipe, "--base", "smollm3", "--data", "good"), 66, "smollm3")
    refused(stack.quartet("train", recipe, "--base", "smollm2", "--data", "bad"), 66, "bad")
    refused(stack.quartet("chat", "nobody", "-m", "hi"), 66, "nobody")
    assert json.loads(stack.quartet("job", "list", "--json").stdout)["jobs"] == []


def test_wrong_words_are_usage_errors(stack: Stack) -> None:
    assert stack.quartet("fly").returncode == 2
    assert stack.quartet("train").returncode == 2


def test_nobody_listens() -> None:
    lost = Stack(Path("/nonexistent"))
    lost.address = "127.0.0.1:1"
    refused(lost.quartet("dataset", "list"), 69, "quartet up", "127.0.0.1:1")


def test_port_in_use(stack: Stack, tmp_path: Path) -> None:
    port = stack.address.rpartition(":")[2]
    command = [sys.executable, "-m", "services", "--port", port, "--home", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode not in (0, 2)
    assert port in done.stderr and "in use" in done.stderr and "Traceback" not in done.stderr


def test_store_unreachable(tmp_path: Path) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    uri = "s3://bucket/quartet?endpoint=http://127.0.0.1:1"
    lost = Stack(tmp_path, "--store-uri", uri, env=keys).start()
    try:
        refused(lost.quartet("dataset", "list", timeout_s=120), 69, "store")
    finally:
        lost.stop()


def test_disk_full(tmp_path: Path, rows: Path) -> None:
    """A file-size limit of 8 MiB stands for a full disk: the write fails as on ENOSPC, and nothing is kept."""
    small = Stack(tmp_path / "home")
    script = (
        "import resource, runpy, signal, sys;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "sys.argv = ['services', *sys.argv[1:]];"
        "import services.__main__;"
        "from services.common.settings import Settings;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20));"
        "runpy.run_module('services', run_name='__main__')"
    )
    file = small.home / "address"
    small.home.mkdir()
    small.process = subprocess.Popen(
        [sys.executable, "-c", script, "--port", "0", "--home", str(small.home), "--address-file", str(file)]
    )
    while not (file.exists() and file.read_text().strip()):
        assert small.process.poll() is None
    small.address = file.read_text().strip()
    try:
        big = tmp_path / "big.jsonl"
        big.write_text(GOOD * 120_000)  # 11 MB
        refused(small.quartet("dataset", "create", "big", str(big)), 73, "full")
        assert small.quartet("dataset", "create", "fits", str(rows)).returncode == 0
    finally:
        small.stop()


def test_cut_upload_goes_on_and_a_wrong_digest_is_refused(stack: Stack, tmp_path: Path) -> None:
    import hashlib

    import google_crc32c
    import grpc
    from quartet.datasets.v1 import datasets_pb2 as pb
    from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

    data = GOOD.encode() * 50_000
    channel = grpc.insecure_channel(stack.address)
    datasets = DatasetsStub(channel)
    dataset = datasets.CreateDataset(pb.CreateDatasetRequest(parent="workspaces/default", dataset_id="cut")).name

    def chunks(upload: str, start: int, end: int) -> list[pb.WriteBlobRequest]:
        step = 1 << 20
        return [
            pb.WriteBlobRequest(
                upload=upload,
                offset_bytes=at,
                data=data[at : min(at + step, end)],
                crc32c=google_crc32c.value(data[at : min(at + step, end)]),
                finish=at + step >= len(data),
            )
            for at in range(start, end, step)
        ]

    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    begun = datasets.BeginUpload(pb.BeginUploadRequest(parent=dataset, digest=digest, size_bytes=len(data)))
    partial = datasets.WriteBlob(iter(chunks(begun.upload, 0, 2 << 20)))  # the stream ends without `finish`
    assert not partial.complete
    status = datasets.GetBlobStatus(pb.GetBlobStatusRequest(upload=begun.upload))
    assert 0 < status.committed_bytes < len(data)
    done = datasets.WriteBlob(iter(chunks(begun.upload, status.committed_bytes, len(data))))
    assert done.complete
    again = datasets.BeginUpload(pb.BeginUploadRequest(parent=dataset, digest=digest, size_bytes=len(data)))
    assert again.complete

    lie = "sha256:" + hashlib.sha256(b"something else").hexdigest()
    begun = datasets.BeginUpload(pb.BeginUploadRequest(parent=dataset, digest=lie, size_bytes=len(data)))
    with pytest.raises(grpc.RpcError) as refusal:
        datasets.WriteBlob(iter(chunks(begun.upload, 0, len(data))))
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    files = [pb.RevisionFile(path="a.jsonl", digest=lie)]
    with pytest.raises(grpc.RpcError) as missing:
        datasets.CommitRevision(pb.CommitRevisionRequest(parent=dataset, files=files))
    assert missing.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    channel.close()
