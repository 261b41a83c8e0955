"""Safetensors files, read and written piece by piece, so that a model never has to be in memory as a whole."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from services.finetune.errors import Cancelled, InvalidArgument
from services.finetune.progress import Attempt

MIB = 1 << 20
DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
"""Our names of dtypes: safetensors' name, bytes of one number."""
NAMES = {word: name for name, (word, _) in DTYPES.items()}
_FLOATS = ("F64", *NAMES)
WIDTHS = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, **dict(DTYPES.values())}
"""Bytes of one number, by safetensors' word."""
TORCH_NAMES = {"F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
               "BOOL": "bool", **NAMES}  # fmt: skip
_HEADER_LIMIT = 100_000_000
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: `dtype` is safetensors' word, `start` and `nbytes` its bytes from the file's beginning.

    `strides`, counted in numbers, are given where the numbers do not lie one after the other; `nbytes` spans them. A
    tensor whose bytes are scattered over files has `pieces` instead, in their order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    file: Path = Path()
    strides: tuple[int, ...] = ()
    pieces: tuple[Stored, ...] = ()
    blob: str = ""
    """The digest of the stored blob that it lies in; `file` is then the path in its artifact."""

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        total = 1
        for side in self.shape:
            total *= side
        return total

    def cast(self, dtype: str) -> Stored:
        """What it becomes in one of DTYPES; integers and "" leave it as it is."""
        if not dtype or self.dtype not in _FLOATS:
            width = WIDTHS[self.dtype] if self.strides else 0
            return replace(self, nbytes=self.count * width or self.nbytes, strides=(), pieces=())
        word, width = DTYPES[dtype]
        return replace(self, dtype=word, nbytes=self.count * width, strides=(), pieces=())

    def named(self, name: str) -> Stored:
        """The same bytes under another name."""
        return replace(self, name=name)


def check_stop(stop: threading.Event) -> None:
    """Cancelled (STOPPED)."""
    if stop.is_set():
        raise Cancelled("stopped; nothing half-made was kept", reason="STOPPED")


def progress(attempt: Attempt, stop: threading.Event) -> Callable[[int, int], None]:
    """A callback of (bytes done, bytes in all) that reports each hundredth part and obeys `stop`."""
    told = -1

    def tell(done: int, total: int) -> None:
        nonlocal told
        check_stop(stop)
        if (part := done * 100 // max(total, 1)) != told:
            told = part
            attempt.emit("progress", done_bytes=done, total_bytes=total)

    return tell


def parse_header(read: Callable[[int, int], bytes], what: str) -> list[Stored]:
    """The tensors of a safetensors file, through `read(offset, length)`. InvalidArgument (WEIGHTS_MALFORMED)."""
    try:
        (length,) = struct.unpack("<Q", read(0, 8))
        if length > _HEADER_LIMIT:
            raise ValueError("its header is too long")
        data: dict[str, Any] = json.loads(read(8, length))
        data.pop("__metadata__", None)
        base = 8 + length
        return [
            Stored(k, v["dtype"], tuple(v["shape"]), base + v["data_offsets"][0],
                   v["data_offsets"][1] - v["data_offsets"][0])
            for k, v in data.items()
        ]  # fmt: skip
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InvalidArgument(
            f"{what} is no safetensors file: {error}; fetch it again", reason="WEIGHTS_MALFORMED"
        ) from error


def read_file_header(path: Path) -> list[Stored]:
    """The tensors of a file, after safetensors' own complete check of it. InvalidArgument (WEIGHTS_MALFORMED)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise InvalidArgument(
            f"{path.name} is no whole safetensors file: {error}; fetch it again", reason="WEIGHTS_MALFORMED"
        ) from error
    with path.open("rb") as source:

        def read(offset: int, length: int) -> bytes:
            source.seek(offset)
            return source.read(length)

        return [replace(t, file=path) for t in parse_header(read, path.name)]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are the model: those of its index, or model.safetensors, or all but other copies.

    InvalidArgument (WEIGHTS_INCOMPLETE) if the index names files that are not there.
    """
    index = folder / INDEX
    if index.is_file():
        named = sorted(set(map(str, _weight_map(index).values())))
        gone = [n for n in named if PurePosixPath(n).name != n or not (folder / n).is_file()]
        if gone:
            raise InvalidArgument(
                f"{INDEX} names {', '.join(gone[:3])}, which is not there; fetch all of the model's files",
                reason="WEIGHTS_INCOMPLETE",
            )
        return [folder / n for n in named]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    # Mistral's consolidated file holds the same weights again under other names; an adapter is no model.
    return [p for p in sorted(folder.glob("*.safetensors")) if not p.name.startswith(("consolidated", "adapter_"))]


def read_folder(folder: Path) -> list[Stored]:
    """All tensors of a model folder, in the order of its files. InvalidArgument (WEIGHTS_*)."""
    found = [t for path in weight_files(folder) for t in sorted(read_file_header(path), key=lambda t: t.name)]
    names = {t.name for t in found}
    index = folder / INDEX
    if len(names) != len(found) or (index.is_file() and set(_weight_map(index)) != names):
        raise InvalidArgument(
            "the weight files and their index do not hold the same tensors; fetch all of the model's files",
            reason="WEIGHTS_INCOMPLETE",
        )
    return found


def raw(tensor: Stored) -> Iterator[bytes | memoryview]:
    """A tensor's bytes, as they are stored where they lie one after the other."""
    if tensor.strides:
        yield to_bytes(as_torch(tensor))
        return
    for part in tensor.pieces:
        yield from raw(part)
    if tensor.pieces:
        return
    with tensor.file.open("rb") as source:
        source.seek(tensor.start)
        left = tensor.nbytes
        while left > 0 and (piece := source.read(min(MIB, left))):
            left -= len(piece)
            yield piece


def as_torch(tensor: Stored) -> Any:
    """The tensor in memory. InvalidArgument (WEIGHTS_MALFORMED) if its file ends before it does."""
    import torch

    data = bytearray(tensor.nbytes)
    at = 0
    for piece in tensor.pieces or (tensor,):
        with piece.file.open("rb") as source:
            source.seek(piece.start)
            if source.readinto(memoryview(data)[at : at + piece.nbytes]) != piece.nbytes:
                raise InvalidArgument(f"{piece.file.name} is cut off; fetch it again", reason="WEIGHTS_MALFORMED")
        at += piece.nbytes
    dtype: Any = getattr(torch, TORCH_NAMES[tensor.dtype])
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.as_strided(tensor.shape, tensor.strides) if tensor.strides else flat.reshape(tensor.shape)


def to_bytes(value: Any) -> bytes | memoryview:
    """A torch tensor's bytes, little endian as safetensors wants them."""
    import torch

    return memoryview(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def cast_bytes(tensor: Stored, dtype: str) -> Iterable[bytes | memoryview]:
    """A tensor's bytes in another dtype, rounded once; untouched if it has that dtype or no floating point."""
    if tensor.cast(dtype).dtype == tensor.dtype:
        return raw(tensor)
    import torch

    return [to_bytes(as_torch(tensor).to(getattr(torch, dtype)))]


def recast(data: bytes, source: str, dtype: str) -> bytes:
    """Numbers of one of DTYPES' words in another, rounded once and to even as torch does, without torch."""
    import numpy as np

    if source == dtype:
        return data
    if source == "BF16":
        wide = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        wide = np.frombuffer(data, "<f2" if source == "F16" else "<f4").astype("<f4", copy=False)
    if dtype == "F32":
        return wide.tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore"):  # becomes infinite, as in torch
            return wide.astype("<f2").tobytes()
    bits = wide.view("<u4")
    # The upper half, and one more where the lower is above a half, or is one and the upper odd.
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded).astype("<u2").tobytes()


def plan(tensors: Iterable[Stored], limit: int) -> list[list[Stored]]:
    """Tensors by file, in their order; no file above `limit` bytes unless one tensor alone is."""
    shards: list[list[Stored]] = []
    size = 0
    for tensor in tensors:
        # An entry of the header: its text, and room for two offsets.
        cost = tensor.nbytes + len(json.dumps([tensor.name, tensor.dtype, tensor.shape])) + 80
        if not shards or size + cost > limit:
            shards.append([])
            size = 64  # length, braces and padding
        shards[-1].append(tensor)
        size += cost
    return shards


def write(
    out: Path,
    shards: Sequence[Sequence[Stored]],
    data: Callable[[Stored], Iterable[bytes | memoryview]],
    done: Callable[[Stored], None],
) -> None:
    """Write shards under the names that transformers expects, with an index if there are several.

    `data` gives a tensor's bytes when its turn comes; `done` is called after each and may raise to stop.
    """
    named = dict(zip(shard_names(len(shards)), shards, strict=True))
    for name, shard in named.items():
        write_file(out / name, shard, data, done)
    if len(shards) > 1:
        (out / INDEX).write_text(index_text(named))


def shard_names(count: int) -> list[str]:
    """The names that transformers expects of a model's files."""
    return (
        ["model.safetensors"]
        if count == 1
        else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    )


def index_text(shards: Mapping[str, Sequence[Stored]]) -> str:
    """The index of a model's files, by their names."""
    where = {t.name: name for name, shard in shards.items() for t in shard}
    total = sum(t.nbytes for shard in shards.values() for t in shard)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1, sort_keys=True)


def order(shard: Iterable[Stored]) -> list[Stored]:
    """The tensors of a file as they lie in it. Wide numbers first: torch can only view bytes as numbers that begin at a
    multiple of their width."""
    return sorted(shard, key=lambda t: (-(t.nbytes // max(t.count, 1)), t.name))


def write_file(
    path: Path,
    shard: Sequence[Stored],
    data: Callable[[Stored], Iterable[bytes | memoryview]],
    done: Callable[[Stored], None],
) -> None:
    """Write one file, as `write` does. InvalidArgument (WEIGHTS_MALFORMED) if a tensor's bytes come out too few or many."""
    ordered = order(shard)
    with path.open("xb") as file:
        file.write(header(ordered))
        for tensor in ordered:
            wrote = sum(file.write(piece) for piece in data(tensor))
            if wrote != tensor.nbytes:
                raise InvalidArgument(
                    f"{tensor.name} has {wrote} bytes, not {tensor.nbytes}; fetch the model again",
                    reason="WEIGHTS_MALFORMED",
                )
            done(tensor)


def header(tensors: Sequence[Stored]) -> bytes:
    """What stands before the bytes of a file's tensors: eight bytes of length, and JSON."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _weight_map(index: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(f"{INDEX} is damaged: {error}; fetch it again", reason="WEIGHTS_MALFORMED") from error
