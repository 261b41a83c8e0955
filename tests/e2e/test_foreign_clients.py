"""Clients that nobody here wrote: Node with @grpc/grpc-js and the protos alone, and buf curl through reflection."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from tests.e2e.stack import Stack

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "client.js"):
        shutil.copy(Path(__file__).parent / "node" / name, folder)
    command: list[str | Path] = [BIN / "npm", "install", "--no-audit", "--no-fund", "--silent"]
    # Without a limit npm waits a quarter of an hour, silent, for a registry that does not answer.
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return folder


def test_node_uploads_trains_and_chats(stack: Stack, node_client: Path, rows: Path) -> None:
    command: list[Any] = [
        BIN / "node",
        "client.js",
        ROOT / "protos",
        stack.address,
        "workspaces/default/models/smollm2",
        rows,
    ]
    done = subprocess.run(command, cwd=node_client, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["rows"] == 16
    assert seen["sequences"] == list(range(1, len(seen["sequences"]) + 1))
    assert seen["losses"] and all(loss > 0 for loss in seen["losses"])
    assert "Paris" in seen["text"]
    assert seen["usage"]["completion_tokens"] > 0
    assert seen["missing"] == {"code": 5, "details": True}


def curl(stack: Stack, method: str, request: object) -> subprocess.CompletedProcess[str]:
    command: list[Any] = [
        BIN / "buf",
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        "-d",
        json.dumps(request),
    ]
    return subprocess.run([*command, f"http://{stack.address}/{method}"], capture_output=True, text=True, timeout=300)


def curl_ok(stack: Stack, method: str, request: object) -> list[dict[str, Any]]:
    done = curl(stack, method, request)
    assert done.returncode == 0, done.stderr
    decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].strip()
    return found


def test_buf_curl_drives_it_through_reflection(stack: Stack, rows: Path) -> None:
    import base64
    import hashlib

    import google_crc32c

    datasets, training = "quartet.datasets.v1.Datasets", "quartet.training.v1.Training"
    inference = "quartet.inference.v1.Inference"
    parent, data = "workspaces/default", rows.read_bytes()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    made = curl_ok(stack, f"{datasets}/CreateDataset", {"parent": parent, "datasetId": "buf"})[0]
    begun = curl_ok(
        stack, f"{datasets}/BeginUpload", {"parent": made["name"], "digest": digest, "sizeBytes": str(len(data))}
    )[0]
    if not begun.get("complete"):
        chunk = {
            "upload": begun["upload"],
            "data": base64.b64encode(data).decode(),
            "crc32c": google_crc32c.value(data),
            "finish": True,
        }
        assert curl_ok(stack, f"{datasets}/WriteBlob", chunk)[0]["complete"] is True
    revision = curl_ok(
        stack,
        f"{datasets}/CommitRevision",
        {"parent": made["name"], "files": [{"path": "a.jsonl", "digest": digest}]},
    )[0]
    job = curl_ok(
        stack,
        f"{training}/CreateTrainingJob",
        {
            "parent": parent,
            "trainingJob": {
                "recipe": "smollm2_135m_lora_assistant_e1",
                "baseModel": f"{parent}/models/smollm2",
                "datasets": [revision["name"]],
                "overrides": {"schedule.max_steps": 2, "data.max_length": 128},
            },
        },
    )[0]
    events = curl_ok(stack, f"{training}/WatchTrainingJob", {"name": job["name"]})
    assert events[-1]["state"]["state"] == "SUCCEEDED"
    endpoint = curl_ok(
        stack, f"{inference}/CreateEndpoint", {"parent": parent, "endpoint": {"model": f"{parent}/models/smollm2"}}
    )[0]
    done = stack.quartet("endpoint", "get", str(endpoint["name"]), "--wait", "--json")
    assert done.returncode == 0, done.stderr
    chat = {
        "endpoint": endpoint["name"],
        "messages": [{"role": "USER", "content": [{"text": "What is the capital of France?"}]}],
        "sampling": {"temperature": 0, "maxTokens": 16},
    }
    text = "".join(str(m.get("text", "")) for m in curl_ok(stack, f"{inference}/Chat", chat))
    assert "Paris" in text
    curl_ok(stack, f"{inference}/DeleteEndpoint", {"name": endpoint["name"]})


def test_buf_curl_sees_error_details(stack: Stack) -> None:
    done = curl(stack, "quartet.training.v1.Training/GetRecipe", {"name": "recipes/smollm2_135m_qlora_asistant_e1"})
    assert done.returncode == 8 * 5  # NOT_FOUND
    told = json.loads(done.stderr)
    assert "did you mean 'smollm2_135m_qlora_assistant_e1'?" in told["message"]
    detail = told["details"][0]
    assert detail["type"] == "google.rpc.ErrorInfo"
    # buf prints a detail's bytes in base64, as Connect does: without padding.
    info = error_details_pb2.ErrorInfo.FromString(base64.b64decode(detail["value"] + "=="))
    assert (info.reason, info.domain) == ("RECIPE_UNKNOWN", "quartet")
