"""Conversion: `convert` is the whole of a conversion worker's work."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

from services.finetune.errors import InvalidArgument, ResourceExhausted
from services.finetune.orders import ConvertRun
from services.finetune.progress import Attempt


def convert(run: ConvertRun, attempt: Attempt, stop: threading.Event, workdir: Path) -> dict[str, str]:
    """Do an order; {"model": digest} of the artifact made.

    Raises Cancelled (STOPPED) when `stop` is set, ResourceExhausted (DISK_FULL) when `workdir` has no room, and what
    the tasks themselves raise.
    """
    try:
        return {"model": _convert(run, attempt, stop, workdir)}
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(
                "the worker's disk is full; free some space and try again", reason="DISK_FULL"
            ) from error
        raise


def _convert(run: ConvertRun, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    if run.import_model is not None:
        from services.finetune.convert.importing import import_model

        return import_model(run.import_model, attempt, stop, workdir)
    if run.assemble is not None:
        from services.finetune.convert.assemble import assemble

        return assemble(run.assemble, attempt, stop)
    if run.adapter is not None:
        from services.finetune.convert.adapter import make_adapter

        return make_adapter(run.adapter, attempt, stop, workdir)
    if run.merge is not None:
        from services.finetune.convert.merge import merge

        return merge(run.merge, attempt, stop)
    if run.reshard is not None:
        from services.finetune.convert.reshard import reshard

        return reshard(run.reshard, attempt, stop)
    if run.export is not None:
        from services.finetune.convert.export import export

        return export(run.export, attempt, stop, workdir)
    if run.quantize is not None:
        from services.finetune.convert.quantize import quantize

        return quantize(run.quantize, attempt, stop, workdir)
    raise InvalidArgument("the order has no task", reason="TASK_MISSING")
