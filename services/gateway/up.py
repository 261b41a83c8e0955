"""``quartet up``: all four services in this process, and the gateway in one beside it."""

from __future__ import annotations

import contextlib
import functools
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from services import __main__ as services
from services.common.server import Beside
from services.common.settings import Settings
from services.finetune.errors import QuartetError
from services.gateway.__main__ import listen

LEAVE_S = 15.0
"""Answers under way have so long when it ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpSettings(Settings):
    """Those of the services, and the gateway's."""

    http_port: int = 8000
    """Where OpenAI's API and the web pages are; 0 takes a free one, -1 none."""


@contextlib.contextmanager
def gateway(made: socket.socket, token_file: str, address: str) -> Iterator[None]:
    """The gateway on the listening socket `made`, in front of the services at `address`."""
    with made:
        command = [sys.executable, "-m", "services.gateway", "--fd", str(made.fileno()), "--endpoint", address]
        command += ["--token-file", token_file] if token_file else []
        # It reads to the end of its input, which is this process's end too, however that comes.
        running = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[made.fileno()])
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            running.stdin.close()  # type: ignore[union-attr]  # it is a pipe
        try:
            running.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def main() -> None:
    """Serve until SIGTERM."""
    beside: Beside = contextlib.nullcontext
    try:
        settings = UpSettings.from_args(sys.argv[1:], "quartet up")
        if settings.tls_cert:
            print("quartet up: no gateway beside services with TLS; quartet gateway starts one", file=sys.stderr)
        elif settings.http_port >= 0:
            host = "127.0.0.1" if settings.host.startswith("unix:") else settings.host
            # Before anything is started: the port may be in use.
            beside = functools.partial(gateway, listen(host, settings.http_port, "--http-port"), settings.token_file)
    except QuartetError as error:
        print(f"quartet up: {error.message}", file=sys.stderr)
        sys.exit(error.exit_status)
    services.main(settings, beside)


if __name__ == "__main__":
    main()
