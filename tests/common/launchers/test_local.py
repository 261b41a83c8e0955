"""What is special to subprocesses; what all launchers share is in test_suite.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.common.launchers.local import LocalLauncher, start_ticks
from tests.common.launchers.programs import SLEEP, soon


@pytest.fixture()
def launcher(tmp_path: Path) -> LocalLauncher:
    return LocalLauncher(tmp_path)


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
    code = (
        "import os; e = os.environ; print(os.getsid(0) == os.getpid(), e['INHERITED'], e['GIVEN'], e['GOMP_SPINCOUNT'])"
    )
    handle = launcher.launch([sys.executable, "-c", code], "a", {"GIVEN": "too"})
    soon(lambda: not launcher.alive(handle))
    assert launcher.tail("a", 5) == "True yes too 1000"
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
