"""The inference service: ``python -m services.inference``. Wires, and nothing else."""

from __future__ import annotations

from quartet.inference.v1.inference_pb2_grpc import add_InferenceServicer_to_server

from services.common import auth
from services.common.launchers import open_launcher
from services.common.records import Records
from services.common.server import Room, main
from services.common.settings import Settings
from services.finetune.store import open_store
from services.inference.keeper import KIND, Keeper
from services.inference.servicer import EngineCalls, Servicer
from services.inference.turns import Turns
from services.inference.usecases import Inference


def build(settings: Settings) -> Room:
    store, records = open_store(settings.store_uri), Records(settings.database_url)
    token = auth.read_token(settings.token_file) if settings.token_file else ""
    keep = settings.launcher == "kubernetes"
    keeper = Keeper(
        store,
        records,
        open_launcher(settings),
        settings.token_file,
        EngineCalls(token),
        keep_engines=keep,
        vllm_python=settings.vllm_python,
    )
    turns = Turns(settings.max_streams, settings.workspace_streams, settings.workspace_queue)
    servicer = Servicer(Inference(store, records, settings.engine), token, turns)
    return Room(
        "quartet.inference.v1.Inference",
        lambda server: add_InferenceServicer_to_server(servicer, server),
        keeper.start,
        keeper.stop,
        lambda: records.counts(KIND),
        servicer.answers.collectors,
    )


if __name__ == "__main__":
    main("quartet-inference", [build])
