"""The conversion service: ``python -m services.conversion``. Wires, and nothing else."""

from __future__ import annotations

from pathlib import Path

from quartet.conversion.v1.conversion_pb2_grpc import add_ConversionServicer_to_server

from services.common.jobs import Jobs
from services.common.launchers import open_launcher
from services.common.records import Records
from services.common.server import Room, main
from services.common.settings import Settings
from services.conversion.servicer import Servicer
from services.conversion.usecases import Conversion
from services.finetune.store import open_store


def build(settings: Settings) -> Room:
    store = open_store(settings.store_uri)
    roots = [Path(root) for root in settings.import_roots.split(":") if root]
    prefixes = [prefix for prefix in settings.export_prefixes.split(",") if prefix]
    conversion = Conversion(store, roots, prefixes, settings.direct_downloads == "on")
    conversion.jobs = Jobs(
        Records(settings.database_url),
        store,
        open_launcher(settings),
        conversion.work,
        max_workers=settings.max_workers,
        grace_s=settings.worker_grace_s,
    )
    servicer = Servicer(conversion)
    return Room(
        "quartet.conversion.v1.Conversion",
        lambda server: add_ConversionServicer_to_server(servicer, server),
        conversion.jobs.start,
        conversion.jobs.stop,
        lambda: conversion.jobs.records.counts(conversion.work.kind),
    )


if __name__ == "__main__":
    main("quartet-conversion", [build])
