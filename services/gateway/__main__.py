"""The gateway: ``python -m services.gateway``, OpenAI's HTTP API in front of the inference service. Wires only."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from services.common import auth
from services.common.settings import Settings
from services.finetune.errors import FailedPrecondition, InvalidArgument, QuartetError


def read(argv: Sequence[str]) -> argparse.Namespace:
    """Flags. InvalidArgument (ADDRESS_EXPOSED)."""
    parser = argparse.ArgumentParser(prog="quartet gateway", description="OpenAI's HTTP API.", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; beyond loopback a token file is needed")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--endpoint", default="", help="the services' address; QUARTET_ENDPOINT if left out")
    parser.add_argument("--workspace", default="default", help="whose endpoints are served")
    parser.add_argument(
        "--token-file",
        default=os.environ.get("QUARTET_TOKEN_FILE", ""),
        help="the services' token; clients must show it as their API key",
    )
    parser.add_argument(
        "--image-urls",
        default="off",
        choices=["off", "on"],
        help="on: fetch images from public web addresses; else only data: URLs are taken",
    )
    parser.add_argument("--address-file", default="", help="write the address to this file once it answers")
    a = parser.parse_args(argv)
    if not Settings(host=a.host).loopback and not a.token_file:
        raise InvalidArgument(f"{a.host} is not a loopback address: give --token-file", reason="ADDRESS_EXPOSED")
    return a


def listen(host: str, port: int) -> socket.socket:
    """FailedPrecondition (PORT_IN_USE)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise FailedPrecondition(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port", reason="PORT_IN_USE"
        ) from error
    return made


def serve(a: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    import uvicorn

    from services.client.client import Client
    from services.gateway.fetching import fetch
    from services.gateway.routes import application

    token = auth.read_token(a.token_file) if a.token_file else ""
    made = listen(a.host, a.port)
    with made, Client(a.endpoint, a.token_file, a.workspace) as client:
        host, port = made.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        config = uvicorn.Config(
            application(client, token, fetch if a.image_urls == "on" else None),
            log_level="warning",
            server_header=False,
        )
        print(f"quartet: serving OpenAI's API on {address}/v1", flush=True)
        if a.address_file:
            part = Path(a.address_file + ".part")
            part.write_text(address)
            part.rename(a.address_file)
        uvicorn.Server(config).run(sockets=[made])


def main() -> None:
    # uvicorn ends its streams on a signal, then raises it again: an orderly end is a success.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        serve(read(sys.argv[1:]))
    except QuartetError as error:
        print(f"quartet gateway: {error.message}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
