"""Pickled files of torch.save, without unpickling them here: a confined process says where their tensors lie."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.finetune.convert import unpickle
from services.finetune.convert.shards import WIDTHS, Stored
from services.finetune.errors import Cancelled, InvalidArgument, ResourceExhausted

MEMORY_BYTES = 4 << 30
"""Address space of the process: room for the tables of the largest checkpoints, which hold no weights."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """Something that a pickle wanted to be, and was not made."""

    name: str


def read_pickle(path: Path, stop: threading.Event) -> Any:
    """What is in a pickled file: dicts, lists, scalars, Stored for a tensor, Opaque for all else.

    InvalidArgument (PICKLE_REFUSED) saying why, ResourceExhausted (OUT_OF_MEMORY), Cancelled (STOPPED).
    """
    command = [sys.executable, "-I", unpickle.__file__, str(path.resolve()), str(MEMORY_BYTES)]
    # No environment: no credentials, no proxies, no PYTHON* of ours.
    with subprocess.Popen(command, env={}, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as child:  # fmt: skip
        while True:
            try:
                answer, said = child.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if stop.is_set():
                    child.kill()
                    raise Cancelled("stopped before anything was kept", reason="STOPPED") from None
    if child.returncode == 3 or child.returncode < 0:
        raise ResourceExhausted(f"the table of {path.name} does not fit into memory", reason="OUT_OF_MEMORY")
    if child.returncode != 0:
        raise refused(path, (said.strip().splitlines() or ["unreadable"])[-1][:300])
    return _decode(json.loads(answer), path, path.stat().st_size)


def read_tensors(path: Path, stop: threading.Event) -> dict[str, Stored]:
    """The tensors of a weights file by name. Anything beside plain tensors is refused; errors as read_pickle."""
    data = read_pickle(path, stop)
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    for name in opaques(data):
        raise refused(path, f"it wants {name}, which is no tensor")
    if not isinstance(data, dict) or not data:
        raise refused(path, "it is no table of tensors by name")
    odd = [str(k) for k, v in data.items() if not isinstance(v, Stored)]
    if odd:
        raise refused(path, "it holds more than plain tensors: " + ", ".join(odd[:3]))
    return {name: stored.named(name) for name, stored in data.items()}


def opaques(data: Any) -> Iterator[str]:
    """What `data` wanted to be beside plain values, anywhere in it."""
    if isinstance(data, Opaque):
        yield data.name
    for value in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from opaques(value)


def refused(path: Path, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"{path.name} is refused: {why}; give the weights as safetensors",
        reason="PICKLE_REFUSED",
        metadata={"file": path.name},
    )


def _decode(node: Any, path: Path, size: int) -> Any:
    if not isinstance(node, Mapping):
        return node
    ((kind, content),) = node.items()
    if kind == "d":
        return {key: _decode(value, path, size) for key, value in content}
    if kind == "l":
        return [_decode(value, path, size) for value in content]
    if kind == "o":
        return Opaque(str(content))
    dtype, shape, start, nbytes, strides = content
    stored = Stored("", dtype, tuple(shape), start, nbytes, path, tuple(strides))
    # The process that said so has read a foreign file: its answer is checked as the file itself would be.
    if start < 0 or nbytes < 0 or start + nbytes > size or (not strides and nbytes != stored.count * WIDTHS[dtype]):
        raise refused(path, "a tensor lies outside of the file")
    return stored
