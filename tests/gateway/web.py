"""A gateway in this process, over real HTTP."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import uvicorn

from services.client.client import Client
from services.gateway.__main__ import listen
from services.gateway.reach import Reach
from services.gateway.routes import application


@contextlib.contextmanager
def gateway(address: str, token: str = "", origins: Sequence[str] = ()) -> Iterator[int]:
    """The port of one in front of the server at `address`; with a `token`, its API key; `origins` as in application."""
    with listen("127.0.0.1", 0) as made, Client(address) as client:
        web = uvicorn.Server(uvicorn.Config(application(Reach(client), token, origins=origins), log_level="warning"))
        thread = threading.Thread(target=web.run, kwargs={"sockets": [made]})
        thread.start()
        while not web.started:
            time.sleep(0.01)
        yield made.getsockname()[1]
        web.should_exit = True
        thread.join()
