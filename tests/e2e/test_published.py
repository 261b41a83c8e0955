"""Published demos, run as where they are deployed: processes that know nothing of Quartet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradio_client import Client

from tests.e2e.stack import Stack
from tests.tiny import tiny_model

KEY = "a-key-that-is-long-enough"


@contextmanager
def page(folder: Path, **told: str) -> Iterator[Client]:
    """`python app.py` of a demo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **told,
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 240
        while f":{port}" not in (folder / "log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        asked = Client(f"http://127.0.0.1:{port}", verbose=False, analytics_enabled=False)
        yield asked
        asked.close()
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_a_demo_loads_the_weights_that_it_cloned(stack: Stack, tmp_path: Path) -> None:
    tiny, demo, far = tiny_model(tmp_path / "tiny"), tmp_path / "demo", tmp_path / "far"
    assert stack.quartet("model", "import", str(tiny), "--name", "published").returncode == 0
    done = stack.quartet("publish", "published", str(demo), "--title", "A demo", "--json")
    assert done.returncode == 0, done.stderr
    assert "transformers" in (demo / "requirements.txt").read_text()
    (demo / "model").rename(far)
    git = ["git", "-C", str(far), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "weights"]):
        subprocess.run([*git, *words], check=True)
    with page(demo, MODEL_REPOSITORY=far.as_uri()) as asked:
        said = [str(piece) for piece in asked.submit("hi", "", 0.0, 1.0, 8, api_name="/chat")]
    # Random weights say nothing sensible; they do say something.
    assert said and said[-1] and (demo / "model" / "config.json").exists()


def test_a_demo_asks_an_endpoint(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "gateway").mkdir()
    assert stack.quartet("endpoint", "create", "smollm2", "--name", "asked").returncode == 0
    with stack.gateway(tmp_path / "gateway", KEY) as address:
        done = stack.quartet("publish", "asked", str(tmp_path / "demo"), "--url", f"{address}/v1")
        assert done.returncode == 0, done.stderr
        with page(tmp_path / "demo", OPENAI_API_KEY=KEY) as asked:
            said = asked.predict("What is the capital of France?", "", 0.0, 1.0, 24, api_name="/chat")
            assert "Paris" in str(said)
    assert stack.quartet("endpoint", "delete", "asked").returncode == 0
