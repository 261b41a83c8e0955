"""A real S3 server for tests: SeaweedFS from its package."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

BUCKET = "quartet"
# Every port that `weed mini` would open, so that many test runs get on beside each other on one machine.
PORTS = (
    *("s3.port", "s3.port.grpc", "s3.port.iceberg", "s3.port.lance"),
    *("filer.port", "filer.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
    *("admin.port", "admin.port.grpc", "metricsPort"),
)


@contextlib.contextmanager
def seaweed() -> Iterator[tuple[str, Mapping[str, str]]]:
    """A server with one bucket: (``s3://quartet?endpoint=...``, the credentials as environment variables)."""
    keys = {"AWS_ACCESS_KEY_ID": "quartet", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16)}
    # Sockets have short paths only, so the folder is not pytest's.
    with tempfile.TemporaryDirectory(prefix="weed-") as folder:
        process, endpoint = _start(Path(folder), keys)
        try:
            _wait(endpoint, process, Path(folder) / "log")
            _make_bucket(endpoint, keys)
            yield f"s3://{BUCKET}?endpoint={endpoint}", keys
        finally:
            process.kill()
            process.wait()


def _start(folder: Path, keys: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    credentials = [{"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [{"name": "quartet", "credentials": credentials, "actions": actions}]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    command = [str(Path(sys.executable).parent / "weed"), "mini", f"-dir={folder}", "-ip=127.0.0.1"]
    command += ["-ip.bind=127.0.0.1", f"-s3.config={folder / 's3.json'}", "-admin.ui=false", "-webdav=false"]
    command += [f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    # It takes credentials from the environment too: of a server that runs already, they would be another's.
    env = {**os.environ, **keys, "TMPDIR": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=env)
    return process, f"http://127.0.0.1:{ports['s3.port']}"


def _make_bucket(endpoint: str, keys: Mapping[str, str]) -> None:
    from minio import Minio

    client = Minio(
        endpoint.removeprefix("http://"),
        access_key=keys["AWS_ACCESS_KEY_ID"],
        secret_key=keys["AWS_SECRET_ACCESS_KEY"],
        secure=False,
        region="us-east-1",
    )
    client.make_bucket(BUCKET)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for made in sockets:
            made.bind(("127.0.0.1", 0))
        return [made.getsockname()[1] for made in sockets]


def _wait(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Ready is when it refuses a request without a signature."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(endpoint, timeout=1).close()
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 403:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(log.read_text()[-2000:])
