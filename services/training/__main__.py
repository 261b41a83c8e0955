"""The training service: ``python -m services.training``. Wires, and nothing else."""

from __future__ import annotations

from quartet.training.v1.training_pb2_grpc import add_TrainingServicer_to_server

from services.common.jobs import Jobs
from services.common.launchers import open_launcher
from services.common.records import Records
from services.common.server import Room, main
from services.common.settings import Settings
from services.finetune.store import open_store
from services.training.planning import Planner, machine
from services.training.servicer import Servicer
from services.training.usecases import Training


def build(settings: Settings) -> Room:
    store = open_store(settings.store_uri)
    training = Training(store, Planner(store, machine(settings)))
    training.jobs = Jobs(
        Records(settings.database_url),
        store,
        open_launcher(settings),
        training.work,
        max_workers=settings.max_workers,
        grace_s=settings.worker_grace_s,
    )
    servicer = Servicer(training)
    return Room(
        "quartet.training.v1.Training",
        lambda server: add_TrainingServicer_to_server(servicer, server),
        training.jobs.start,
        training.jobs.stop,
        lambda: training.jobs.records.counts(training.work.kind),
    )


if __name__ == "__main__":
    main("quartet-training", [build])
