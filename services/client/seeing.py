"""What `quartet chat --visual-encoder V --llava L` talks to: a language model, a tower, and what was tuned on them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from quartet.conversion.v1 import conversion_pb2

from services.client.client import Client
from services.client.commands import readable, short_name
from services.client.commands.models import upload_checkpoint
from services.client.sources import finished
from services.finetune.errors import FailedPrecondition, InvalidArgument, NotFound

MAX_IMAGE_BYTES = 3_900_000
"""A message to the services has 4 MiB in all; larger images are files of datasets."""


def read_image(path: str) -> bytes:
    """InvalidArgument (IMAGE_TOO_LARGE, IMAGE_NOT_LOCAL), NotFound (FILE_NOT_FOUND)."""
    if path.startswith(("http://", "https://")):
        raise InvalidArgument(
            f"{path} is an address, and none is fetched: download it and name the file", reason="IMAGE_NOT_LOCAL"
        )
    data = readable(path).read_bytes()
    if len(data) > MAX_IMAGE_BYTES:
        raise InvalidArgument(
            f"{path} has {len(data)} bytes, and {MAX_IMAGE_BYTES} may be sent; scale it down", reason="IMAGE_TOO_LARGE"
        )
    return data


def seeing_model(client: Client, a: Namespace) -> tuple[str, str]:
    """(whole model, adapter or "") of the options of a talk. NotFound (MODEL_NOT_FOUND), FailedPrecondition
    (BASE_MISMATCH), InvalidArgument (TASK_INVALID)."""
    if a.adapter:
        raise InvalidArgument("--adapter is a text model's; a LLaVA adapter goes by --llava", reason="TASK_INVALID")
    path = Path(a.llava).expanduser()
    if a.llava and not path.exists():
        tuned = client.model(a.llava)
        if tuned.kind != conversion_pb2.Model.ADAPTER:
            return tuned.name, ""
        whole = client.model(next(p.name for p in tuned.parents if p.role == "base"))
        _check_parts(client, whole, a)
        return whole.name, tuned.name
    if not a.visual_encoder:
        raise InvalidArgument("name the vision tower with --visual-encoder", reason="TASK_INVALID")
    whole_name = _assembled(client, a)
    return whole_name, _brought(client, path, whole_name, a) if a.llava else ""


def _check_parts(client: Client, whole: conversion_pb2.Model, a: Namespace) -> None:
    """FailedPrecondition (BASE_MISMATCH) if `whole` was assembled of others than those that are named."""
    parts = {p.role: p.digest for p in whole.parents}
    for role, name in (("language_model", a.model), ("vision_tower", a.visual_encoder)):
        if name and role in parts and client.model(name).digest != parts[role] and name != whole.name:
            raise FailedPrecondition(
                f"{a.llava} was tuned on another {role.replace('_', ' ')} than {name}", reason="BASE_MISMATCH"
            )


def _assembled(client: Client, a: Namespace) -> str:
    """The model of the two, which is made if it was not before."""
    language, tower = (client.name("models", name) for name in (a.model, a.visual_encoder))
    ids = (name.rpartition("/")[2] for name in (language, tower))
    target = client.name("models", short_name("-".join(ids))[:63].rstrip("-"))
    try:
        found = client.model(target)
    except NotFound:
        task = conversion_pb2.AssembleTask(language_model=language, vision_tower=tower)
        return finished(client, client.convert(target, assemble=task))
    parts = {p.role: p.digest for p in found.parents}
    if [parts.get(r) for r in ("language_model", "vision_tower")] != [
        client.model(m).digest for m in (language, tower)
    ]:
        raise FailedPrecondition(
            f"{target} was assembled of others; assemble these under another name and talk to that",
            reason="BASE_MISMATCH",
        )
    return target


def _brought(client: Client, path: Path, base: str, a: Namespace) -> str:
    """An adapter made of XTuner's file or folder, once."""
    target = client.name("models", short_name(f"{path.stem}-{base.rpartition('/')[2]}")[:63].rstrip("-"))
    try:
        return client.model(target).name
    except NotFound:
        revision = upload_checkpoint(client, path, target)
        task = conversion_pb2.AdapterTask(dtype="float32", base=base, revision=revision)
        return finished(client, client.convert(target, adapter=task))
