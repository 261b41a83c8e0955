"""What every launcher must do; each adapter passes it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from services.common.launchers import Launcher
from services.common.launchers.local import start_ticks
from tests.common.launchers.conftest import Place
from tests.common.launchers.programs import DEAF, SLEEP, soon


def test_a_process_lives_until_it_ends(launcher: Launcher) -> None:
    handle = launcher.launch([sys.executable, "-c", "print('all done')"], "a", {})
    soon(lambda: not launcher.alive(handle))
    assert launcher.tail("a", 5) == "all done"
    assert not launcher.disrupted(handle) and launcher.trouble(handle) == ""


def test_stop_asks_first(launcher: Launcher) -> None:
    handle = launcher.launch(SLEEP, "a", {})
    assert launcher.alive(handle)
    begun = time.monotonic()
    launcher.stop(handle, 30)
    soon(lambda: not launcher.alive(handle))
    assert time.monotonic() - begun < 5
    launcher.stop(handle, 30)  # gone already: no error


def test_stop_kills_in_the_end(launcher: Launcher) -> None:
    handle = launcher.launch(DEAF, "a", {})
    soon(lambda: launcher.tail("a", 1) == "up")
    launcher.stop(handle, 1)
    time.sleep(0.3)
    assert launcher.alive(handle)
    soon(lambda: not launcher.alive(handle))


def test_stop_reaches_its_children(launcher: Launcher) -> None:
    code = f"import subprocess, sys; c = subprocess.Popen({SLEEP!r}); print(c.pid, flush=True); c.wait()"
    handle = launcher.launch([sys.executable, "-S", "-c", code], "a", {})
    soon(lambda: len(launcher.tail("a", 2).split()) == 2)
    child = next(int(word) for word in launcher.tail("a", 2).split() if word.isdigit())
    launcher.stop(handle, 5)
    soon(lambda: not launcher.alive(handle) and start_ticks(child) is None)


def test_kill_of_the_process_is_seen(launcher: Launcher, place: Place) -> None:
    handle = launcher.launch(SLEEP, "a", {})
    soon(lambda: launcher.tail("a", 1) == "up")
    os.kill(place.pid(handle), signal.SIGKILL)
    soon(lambda: not launcher.alive(handle))
    assert not launcher.disrupted(handle)


def test_another_launcher_finds_it_by_its_handle(launcher: Launcher, place: Place) -> None:
    handle = json.loads(json.dumps(launcher.launch(SLEEP, "a", {})))
    other = place.open()
    assert other.alive(handle)
    other.stop(handle, 5)
    soon(lambda: not launcher.alive(handle))


def test_another_launcher_finds_it_by_name_and_claim(launcher: Launcher, place: Place) -> None:
    """The service was cut before it noted the handle."""
    handle = launcher.launch(SLEEP, "a", {})
    pid = place.pid(handle)
    claim = {"host": "h", "pid": pid, "start_ticks": start_ticks(pid)}
    assert place.open().find("a", claim) == handle
    assert place.open().find("never-launched", None) is None
    launcher.stop(handle, 5)


def test_the_tail_is_the_end_of_what_it_printed(launcher: Launcher) -> None:
    handle = launcher.launch([sys.executable, "-c", "for n in range(9): print('line', n)"], "a", {})
    soon(lambda: not launcher.alive(handle))
    assert launcher.tail("a", 2).split("\n") == ["line 7", "line 8"]
    assert launcher.tail("none", 5) == ""


def test_it_gets_its_environment(launcher: Launcher) -> None:
    code = "import os; print(os.getsid(0) == os.getpid(), os.environ['GIVEN'])"
    handle = launcher.launch([sys.executable, "-c", code], "a", {"GIVEN": "too"})
    soon(lambda: not launcher.alive(handle))
    assert launcher.tail("a", 5) == "True too"


def test_names_may_be_long_and_odd(launcher: Launcher) -> None:
    name = "default.trainingJobs." + "x" * 63 + ".0a1b2c3d-12"
    handle = launcher.launch([sys.executable, "-c", "print('here')"], name, {})
    other = launcher.launch([sys.executable, "-c", "print('there')"], name[:-1] + "3", {})
    soon(lambda: not launcher.alive(handle) and not launcher.alive(other))
    assert (launcher.tail(name, 1), launcher.tail(name[:-1] + "3", 1)) == ("here", "there")
