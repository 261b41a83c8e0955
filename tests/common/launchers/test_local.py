"""Subprocesses that outlive the service."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.common.launchers.local import LocalLauncher, start_ticks

SLEEP = [sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(60)"]
DEAF = [
    sys.executable,
    "-S",
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]


@pytest.fixture()
def launcher(tmp_path: Path) -> LocalLauncher:
    return LocalLauncher(tmp_path)


def soon(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stop_asks_first(launcher: LocalLauncher) -> None:
    handle = launcher.launch(SLEEP, "a", {})
    assert launcher.alive(handle)
    begun = time.monotonic()
    launcher.stop(handle, 30)
    soon(lambda: not launcher.alive(handle))
    assert time.monotonic() - begun < 5
    launcher.stop(handle, 30)  # gone already: no error


def test_stop_kills_in_the_end(launcher: LocalLauncher) -> None:
    handle = launcher.launch(DEAF, "a", {})
    soon(lambda: launcher.tail("a", 1) == "up")
    launcher.stop(handle, 0.3)
    time.sleep(0.1)
    assert launcher.alive(handle)
    soon(lambda: not launcher.alive(handle))


def test_stop_reaches_its_children(launcher: LocalLauncher) -> None:
    code = f"import subprocess, sys; c = subprocess.Popen({SLEEP!r}); print(c.pid, flush=True); c.wait()"
    handle = launcher.launch([sys.executable, "-S", "-c", code], "a", {})
    soon(lambda: len(launcher.tail("a", 2).split()) == 2)
    child = next(int(word) for word in launcher.tail("a", 2).split() if word.isdigit())
    launcher.stop(handle, 5)
    soon(lambda: not launcher.alive(handle) and start_ticks(child) is None)


def test_another_launcher_finds_it(launcher: LocalLauncher, tmp_path: Path) -> None:
    handle = launcher.launch(SLEEP, "a", {})
    other = LocalLauncher(tmp_path)
    assert other.alive(handle)
    other.stop(handle, 5)
    soon(lambda: not launcher.alive(handle))


def test_a_later_process_with_its_pid_is_not_it(launcher: LocalLauncher) -> None:
    handle = {"pid": os.getpid(), "start_ticks": (start_ticks(os.getpid()) or 0) - 1}
    assert not launcher.alive(handle)
    launcher.stop(handle, 0)  # or this test would end here
    assert not launcher.alive({"pid": os.getpid(), "start_ticks": None})


def test_no_zombie_stays(launcher: LocalLauncher) -> None:
    handle = launcher.launch([sys.executable, "-S", "-c", "pass"], "a", {})
    soon(lambda: not Path(f"/proc/{handle['pid']}").exists())


def test_own_session_log_and_environment(launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    code = "import os; e = os.environ; print(os.getsid(0) == os.getpid(), e['INHERITED'], e['GIVEN'], e['OMP_WAIT_POLICY'])"
    handle = launcher.launch([sys.executable, "-c", code], "a", {"GIVEN": "too"})
    soon(lambda: not launcher.alive(handle))
    assert launcher.tail("a", 5) == "True yes too PASSIVE"
    assert launcher.tail("none", 5) == ""


def test_it_outlives_the_service(tmp_path: Path) -> None:
    code = (
        "import json, os, signal, sys; from pathlib import Path; from services.common.launchers.local import LocalLauncher;"
        f"print(json.dumps(LocalLauncher(Path({str(tmp_path)!r})).launch({SLEEP!r}, 'a', {{}})), flush=True);"
        "os.killpg(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)
    assert done.returncode == -9, done.stderr
    import json

    launcher = LocalLauncher(tmp_path)
    handle = json.loads(done.stdout)
    assert launcher.alive(handle)
    launcher.stop(handle, 5)
    soon(lambda: not launcher.alive(handle))
