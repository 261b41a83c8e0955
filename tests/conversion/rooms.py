"""The conversion room on a unix socket, with scripted workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from quartet.conversion.v1.conversion_pb2_grpc import ConversionStub, add_ConversionServicer_to_server

from services.common.jobs import Jobs
from services.common.records import Records
from services.common.server import Room
from services.conversion.servicer import Servicer
from services.conversion.usecases import Conversion
from services.finetune.store import Store
from tests.common.jobbing import ScriptLauncher
from tests.common.serving import serve


@contextmanager
def serving(home: Path, store: Store, roots: Sequence[Path] = ()) -> Iterator[ConversionStub]:
    conversion, records = Conversion(store, list(roots)), Records(f"sqlite:///{home}/q.db")
    conversion.jobs = Jobs(records, store, ScriptLauncher(home), conversion.work, max_workers=4, grace_s=5)
    servicer = Servicer(conversion)
    made = Room(
        "quartet.conversion.v1.Conversion",
        lambda server: add_ConversionServicer_to_server(servicer, server),
        conversion.jobs.start,
        conversion.jobs.stop,
    )
    with serve(made, home) as channel:
        yield ConversionStub(channel)
    records.close()
