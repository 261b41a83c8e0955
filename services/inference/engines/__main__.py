"""The engine server: ``python -m services.inference.engines <run.json URI>``. One endpoint, one process, one model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quartet.inference.v1.inference_pb2_grpc import add_InferenceServicer_to_server

from services.common import tracing
from services.common.server import Room, Server
from services.common.settings import Settings
from services.finetune.__main__ import who_am_i
from services.finetune.errors import NotFound, QuartetError
from services.finetune.progress import Attempt, Fenced, Outcome, attempt_key, dump, split_run_uri
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import Manifest, load, materialise
from services.finetune.tokenizer import Tokenizer
from services.finetune.vision import check_token, read_form
from services.inference.engines.port import Engine

log = logging.getLogger("quartet.engine")

HOST_VARIABLE, PORT_VARIABLE = "QUARTET_ENGINE_HOST", "QUARTET_ENGINE_PORT"
"""Where to listen; a free port of loopback if they are not set. Not a service's variables, which an engine inherits."""
METRICS_VARIABLE = "QUARTET_ENGINE_METRICS_PORT"
"""Where Prometheus finds /metrics, on the same host and without a token; nowhere if it is not set."""
FENCE_S = 3.0
"""Seconds between looks at the fence: an engine that lost its endpoint lives on so long at most."""


async def build(store: Store, order: dict[str, Any], folder: Path) -> tuple[Room, Engine]:
    """Load what the order names. FailedPrecondition if it cannot be served.

    Of what is put in `folder` the engine may need anything but the base's weights as long as it lives.
    """
    from services.finetune.train.model import check_no_code, choose_dtype
    from services.inference.engines.adapters import Served
    from services.inference.engines.servicer import EngineServicer

    model = order["model"]
    served = [Served("", model["name"], model["digest"], load(store, model["digest"]))]
    base = materialise(store, served[0].manifest, folder / "base")
    check_no_code(base)
    adapters = {}
    for n, adapter in enumerate(order["adapters"]):
        served.append(Served(adapter["alias"], adapter["name"], adapter["digest"], load(store, adapter["digest"])))
        adapters[served[-1].key] = materialise(store, served[-1].manifest, folder / f"adapter-{n}")
    dtype = order["dtype"] or str(choose_dtype("auto")[0]).removeprefix("torch.")
    engine = await _open(order, served[0].manifest, base, adapters, dtype)
    for weights in base.glob("*.safetensors"):
        weights.unlink()
    tokenizer = Tokenizer.from_files(base)
    form = read_form(base)
    if form is not None:
        check_token(form, tokenizer)
    servicer = EngineServicer(order["endpoint"], engine, tokenizer, served, store, form)
    room = Room(
        "quartet.inference.v1.Inference",
        lambda server: add_InferenceServicer_to_server(servicer, server),
        collectors=servicer.collectors,
    )
    return room, engine


async def _open(
    order: Mapping[str, Any], manifest: Manifest, base: Path, adapters: Mapping[str, Path], dtype: str
) -> Engine:
    bits = order["bits"]
    if manifest.kind == "encoder":
        from services.inference.engines.encoder import EncoderEngine

        meta = manifest.meta
        return EncoderEngine(base, dtype, meta["context_length"], meta["pooling"], meta["normalize"])
    if order["engine"] == "vllm":
        from services.inference.engines.vllm import VllmEngine

        return await VllmEngine.open(base, adapters, dtype, bits, measured=METRICS_VARIABLE in os.environ)
    from services.inference.engines.transformers import TransformersEngine

    return TransformersEngine(base, adapters, dtype, bits)


async def start(store: Store, order: dict[str, Any], attempt: Attempt) -> int:
    """Load, then answer to the end; the exit status."""
    with tempfile.TemporaryDirectory(prefix="quartet-") as folder:
        room, engine = await build(store, order, Path(folder))
        await serve(room, engine, order["token_file"], attempt)
        died = not engine.alive()
        engine.close()
    return int(died)


async def serve(room: Room, engine: Engine, token_file: str, attempt: Attempt) -> None:
    """Answer until SIGTERM, or until another attempt or nobody owns the endpoint."""
    host, port = os.environ.get(HOST_VARIABLE, "127.0.0.1"), int(os.environ.get(PORT_VARIABLE, "0"))
    settings = Settings(host=host, port=port, token_file=token_file, metrics_port=_metrics_port(host))
    settings.check_exposure()
    server = Server(settings, [room])
    await server.open()
    ready = dump({"address": server.address, "context_length": engine.context_length})
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await asyncio.to_thread(attempt.store.put, f"{attempt.key}/ready.json", ready)
    log.info("ready on %s", server.address)
    watch = asyncio.create_task(_watch(attempt, engine, ended))
    await ended.wait()
    watch.cancel()
    await server.close()


def _metrics_port(host: str) -> int:
    """The one that is told. Of the engines of one machine the first has it: that the others' numbers cannot be had is no
    reason not to answer."""
    port = int(os.environ.get(METRICS_VARIABLE, "0"))
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            log.warning("no metrics: port %d of %s cannot be had: %s", port, METRICS_VARIABLE, error.strerror)
            return 0
    return port


async def _watch(attempt: Attempt, engine: Engine, ended: asyncio.Event) -> None:
    """The service that started this engine may be gone, and the next one may not know of it; so may the process
    that runs the model be."""
    while not ended.is_set():
        try:
            await asyncio.to_thread(attempt.check)
        except Fenced:
            log.warning("this engine's endpoint was deleted or started again elsewhere")
            ended.set()
        except QuartetError:
            pass  # the store is away: answers need none
        if not engine.alive():
            log.error("the process that runs the model died")
            ended.set()
        await asyncio.sleep(FENCE_S)


def run(store: Store, key: str, number: int) -> int:
    """Serve one attempt; the exit status. A fault that trying again cannot mend is published for the service."""
    with Attempt(store, key, number) as attempt:
        try:
            attempt.claim(who_am_i())
            # Whoever raised the fence before it could see the claim is seen here.
            attempt.check()
            found = store.get(f"{attempt_key(key, number)}/run.json")
            if found is None:
                raise NotFound(f"there is no order at {key}", reason="ARTIFACT_NOT_FOUND")
            order = json.loads(found.data)
            return asyncio.run(start(store, order, attempt))
        except QuartetError as error:
            log.error("%s", error.message)
            if error.retryable:
                return error.exit_status if isinstance(error, Fenced) else 1
            with contextlib.suppress(Fenced):
                attempt.publish(Outcome("FAILED", {}, error.to_json()))
            return error.exit_status


def main() -> int:
    """The main function of an engine server."""
    if len(sys.argv) != 2:
        print("usage: python -m services.inference.engines <run.json URI>", file=sys.stderr)
        return 64
    os.environ.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        TRANSFORMERS_VERBOSITY="error",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("quartet").setLevel(logging.INFO)
    # It advises faster kernels at each start, from a place that this server does not fetch code from.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    tracing.name_process("quartet-engine")
    # While a model loads nothing handles SIGTERM yet: leave by an exception, so that the folder is tidied up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        store_uri, key, number = split_run_uri(sys.argv[1])
    except ValueError as error:
        print(f"engine: {error}", file=sys.stderr)
        return 64
    return run(open_store(store_uri), key, number)


if __name__ == "__main__":
    ended = main()
    logging.shutdown()
    # All is written. Taking the interpreter apart takes seconds, and must not happen under threads that compute.
    os._exit(ended)
