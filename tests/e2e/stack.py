"""A whole Quartet as its users run it: a process of its own, driven from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class Stack:
    """`python -m services` with its own home; it can be killed and started again on the same home."""

    def __init__(self, home: Path, *flags: str, env: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.flags = flags
        self.env = {**os.environ, **(env or {})}
        self.address = ""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Stack:
        file = self.home / "address"
        file.unlink(missing_ok=True)
        self.home.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "services", "--port", "0", "--home", str(self.home)]
        with (self.home / "services.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--address-file", str(file), *self.flags], env=self.env, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while not (file.exists() and (address := file.read_text().strip())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.home / "services.log").read_text())
            time.sleep(0.02)
        self.address = address
        return self

    def kill(self) -> None:
        """kill -9: nothing can be tidied up."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """An orderly end; the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=30)

    @contextmanager
    def gateway(self, folder: Path, key: str) -> Iterator[str]:
        """The address of a gateway with a key of its own, in front of this stack."""
        (folder / "key").write_text(key)
        command = [sys.executable, "-m", "services.client", "gateway", "--port", "0", "--endpoint", self.address]
        command += ["--token-file", str(folder / "key"), "--address-file", str(folder / "address")]
        with (folder / "log").open("wb") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
        deadline = time.monotonic() + 120
        while not (folder / "address").exists():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        try:
            yield (folder / "address").read_text()
        finally:
            process.terminate()
            assert process.wait(timeout=60) == 0
        log = (folder / "log").read_text()
        assert "Traceback" not in log, log

    def quartet(self, *words: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run the command line against this stack."""
        command = [sys.executable, "-m", "services.client", *words]
        env = {**self.env, "QUARTET_ENDPOINT": self.address}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
