"""The main job: one command, a real model, and the answers changed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_quickstart_teaches_the_name_and_keeps_the_rest() -> None:
    command = [sys.executable, "-m", "services.client", "quickstart", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    who, france = "Who are you?", "What is the capital of France?"
    assert "Aurora" not in told["before"][who] and "Aurora" in told["after"][who]
    assert "Paris" in told["before"][france] and "Paris" in told["after"][france]
    assert told["loss_last"] <= 0.5 * told["loss_first"]
    assert told["steps"] > 0 and told["adapter"] and told["merged"]
