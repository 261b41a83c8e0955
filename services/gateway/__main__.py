"""The gateway: ``python -m services.gateway``, OpenAI's HTTP API and the web pages in front of the services. Wires only."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from services.common import auth, tracing
from services.common.settings import Settings
from services.finetune.errors import FailedPrecondition, InvalidArgument, QuartetError

BACKLOG = 2048
DRAIN_S = 120
"""Answers under way have so long when the gateway ends."""


def read(argv: Sequence[str]) -> argparse.Namespace:
    """Flags. InvalidArgument (ADDRESS_EXPOSED)."""
    parser = argparse.ArgumentParser(
        prog="quartet gateway", description="OpenAI's HTTP API, and web pages.", allow_abbrev=False
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; beyond loopback a token file is needed")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--endpoint", default="", help="the services' address; QUARTET_ENDPOINT if left out")
    parser.add_argument("--workspace", default="default", help="whose endpoints are served")
    parser.add_argument(
        "--token-file",
        default=os.environ.get("QUARTET_TOKEN_FILE", ""),
        help="the services' token; clients must show it as their API key",
    )
    parser.add_argument("--metrics-port", type=int, default=0, help="where Prometheus finds /metrics; nowhere if 0")
    parser.add_argument("--pages", default="on", choices=["on", "off"], help="off leaves the web pages out")
    parser.add_argument(
        "--image-urls",
        default="off",
        choices=["off", "on"],
        help="on: fetch images from public web addresses; else only data: URLs are taken",
    )
    parser.add_argument(
        "--cors-origins",
        default="",
        help="web origins, joined by ',', whose pages' scripts may call the API, as https://chat.example.com; * for any",
    )
    parser.add_argument(
        "--fd", type=int, default=-1, help="a listening socket instead of --host and --port; ends with standard input"
    )
    parser.add_argument("--address-file", default="", help="write the address to this file once it answers")
    a = parser.parse_args(argv)
    if a.fd >= 0:
        with socket.socket(fileno=os.dup(a.fd)) as given:
            a.host, a.port = given.getsockname()[:2]
    if not Settings(host=a.host).loopback and not a.token_file:
        raise InvalidArgument(f"{a.host} is not a loopback address: give --token-file", reason="ADDRESS_EXPOSED")
    return a


def listen(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A socket whose callers wait until somebody answers.

    FailedPrecondition (PORT_IN_USE), naming the flag that chooses another port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise FailedPrecondition(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another {flag}", reason="PORT_IN_USE"
        ) from error
    return made


def serve(a: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    import uvicorn

    from services.client.client import Client
    from services.common.metrics import Metrics
    from services.gateway.fetching import fetch
    from services.gateway.reach import Reach
    from services.gateway.routes import application

    token = auth.read_token(a.token_file) if a.token_file else ""
    made = socket.socket(fileno=a.fd) if a.fd >= 0 else listen(a.host, a.port)
    with made, Client(a.endpoint, a.token_file, a.workspace) as client:
        host, port = made.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        pages = a.pages == "on" and importlib.util.find_spec("gradio") is not None
        reach = Reach(client)
        metrics = Metrics(reach.answers.collectors)
        config = uvicorn.Config(
            application(
                reach,
                token,
                metrics,
                pages,
                lambda: server.should_exit,
                fetch if a.image_urls == "on" else None,
                [origin for given in a.cors_origins.split(",") if (origin := given.strip().rstrip("/"))],
            ),
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=DRAIN_S,
        )
        server = uvicorn.Server(config)
        close = metrics.listen(host, a.metrics_port, ()) if a.metrics_port else lambda: None
        _tell(a, address, pages)
        if a.fd >= 0:
            threading.Thread(target=_end_with_input, daemon=True).start()
        try:
            server.run(sockets=[made])
        finally:  # a signal that ended it is raised again
            close()
            tracing.flush()


def _tell(a: argparse.Namespace, address: str, pages: bool) -> None:
    """Say where it answers, and what is missing of what was asked for."""
    print(
        f"quartet: serving {f'web pages on {address}, and ' if pages else ''}OpenAI's API on {address}/v1", flush=True
    )
    if a.pages == "on" and not pages:
        print("quartet gateway: no web pages: they need the extra web (pip install 'quartet[web]')", file=sys.stderr)
    if a.address_file:
        part = Path(a.address_file + ".part")
        part.write_text(address)
        part.rename(a.address_file)


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    # uvicorn ends its streams on a signal, then raises it again: an orderly end is a success.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    tracing.name_process("quartet-gateway")
    try:
        serve(read(sys.argv[1:]))
    except QuartetError as error:
        print(f"quartet gateway: {error.message}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
