"""The datasets service alone: python -m services.datasets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from quartet.datasets.v1 import datasets_pb2_grpc as rpc

from services.common import server
from services.common.jobs import Jobs
from services.common.launchers import open_launcher
from services.common.records import Records
from services.common.settings import Settings
from services.datasets.preparing import Preparing
from services.datasets.references import Allowed
from services.datasets.servicer import Servicer
from services.datasets.uploads import Uploads
from services.datasets.usecases import Datasets
from services.datasets.validating import Validating
from services.finetune.store import open_store


def build(settings: Settings) -> server.Room:
    """The room, wired as the settings say."""
    scratch = Path(settings.home) / "tmp" / "datasets"
    # What a killed service left behind.
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    store = open_store(settings.store_uri)
    roots = [Path(root) for root in settings.import_roots.split(":") if root]
    prefixes = [prefix for prefix in settings.import_prefixes.split(",") if prefix]
    datasets = Datasets(store, scratch, Allowed(roots, prefixes, settings.hub_datasets == "on"))
    preparing, validating = Preparing(store, datasets), Validating(store, datasets)
    records, launcher = Records(settings.database_url), open_launcher(settings)
    limits: dict[str, Any] = {"max_workers": settings.max_workers, "grace_s": settings.worker_grace_s}
    preparing.jobs = Jobs(records, store, launcher, preparing.work, **limits)
    validating.jobs = Jobs(records, store, launcher, validating.work, **limits)
    uploads = Uploads(store, datasets.get, settings.direct_uploads == "on")
    servicer = Servicer(datasets, uploads, preparing, validating)

    def start() -> None:
        preparing.jobs.start()
        validating.jobs.start()

    def stop() -> None:
        preparing.jobs.stop()
        validating.jobs.stop()

    return server.Room(
        "quartet.datasets.v1.Datasets",
        lambda target: rpc.add_DatasetsServicer_to_server(servicer, target),
        start,
        stop,
        lambda: records.counts(preparing.work.kind, validating.work.kind),
    )


def main() -> None:
    """Serve until SIGTERM."""
    server.main("quartet-datasets", [build])


if __name__ == "__main__":
    main()
