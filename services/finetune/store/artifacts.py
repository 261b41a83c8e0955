"""Artifacts and their names.

An artifact is a manifest; its files are blobs named by sha256, as in OCI registries. The manifest is written last, so a
torn artifact cannot exist; its own sha256 is the artifact's digest. It names its parents, so lineage is a walk. It holds
no time and no host: equal content gives the equal digest.

A ref gives an artifact (or any small record) a resource name: ``refs/<name>.json``. Refs are the one registry that all
services share; the service that owns a kind of name is the only one to write it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from services.finetune.errors import DataLoss, InvalidArgument, NotFound, OutOfRange
from services.finetune.store.port import Blob, Store

Kind = Literal["dataset", "prepared", "base", "vision_tower", "encoder", "adapter", "merged", "quantized", "exported",
               "checkpoint", "report"]  # fmt: skip
NEEDS_BASE: tuple[Kind, ...] = ("adapter", "checkpoint")
"""Kinds that are of no use without the parent in the role "base"; all others are whole."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of an artifact: a relative path with forward slashes, and its blob."""

    path: str
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Parent:
    """What an artifact was made from. `role` is base, adapter, checkpoint, dataset, source, language_model or
    vision_tower."""

    role: str
    digest: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole artifact. `meta` is what its kind needs to describe itself (docs/decisions/0003)."""

    kind: Kind
    files: tuple[File, ...]
    parents: tuple[Parent, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def file(self, path: str) -> File:
        """The file at `path`. NotFound (FILE_NOT_FOUND)."""
        for found in self.files:
            if found.path == path:
                return found
        raise NotFound(f"the artifact has no file {path!r}", reason="FILE_NOT_FOUND", metadata={"path": path})

    @property
    def size(self) -> int:
        return sum(f.size for f in self.files)


@dataclass(frozen=True, slots=True)
class Ref:
    """A name and what it stands for; `body` has at least "digest" where the name is an artifact's."""

    name: str
    body: Mapping[str, Any]
    etag: str


def check_path(path: str) -> str:
    """`path` if it stays inside the artifact, on any machine. InvalidArgument (PATH_UNSAFE)."""
    pure = PurePosixPath(path)
    odd = any(ord(c) < 32 or c in '\\:*?"<>|' for c in path)
    if not path or odd or pure.is_absolute() or not all(map(_plain_part, pure.parts)) or str(pure) != path:
        raise _unsafe(path)
    if len(path) > 512:
        raise _unsafe(path)
    return path


def _plain_part(part: str) -> bool:
    """A file's name on any machine: Windows drops a dot or space at the end, and compatibility forms of dots and slashes
    (as ‥ and ／) become plain ones where names are normalised."""
    try:
        size = len(part.encode())
    except UnicodeEncodeError:
        return False
    if part.isascii():
        return size <= 255 and part not in ("..", ".") and part[-1] not in ". "
    plain = unicodedata.normalize("NFKC", part)
    same_marks = all(plain.count(c) == part.count(c) for c in "./\\")
    return size <= 255 and same_marks and plain[-1:] not in (".", " ", "")


def _unsafe(path: str) -> InvalidArgument:
    shown = path[:200].encode("utf-8", "backslashreplace").decode()
    return InvalidArgument(
        f"unsafe path {shown!r}: use a relative path of plain names with forward slashes and without '..'",
        reason="PATH_UNSAFE",
        metadata={"path": shown},
    )


def publish(store: Store, manifest: Manifest) -> str:
    """Write a manifest whose blobs are all stored; its digest. InvalidArgument (PATH_UNSAFE, BLOB_MISSING)."""
    for f in manifest.files:
        check_path(f.path)
        if store.touch_blob(f.digest) is None:
            raise InvalidArgument(f"{f.path}: blob {f.digest} is not in the store", reason="BLOB_MISSING")
    data = json.dumps(asdict(manifest), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    # An equal manifest may be there already; writing the same bytes again is harmless.
    store.put(f"manifests/{digest[7:]}.json", data)
    return digest


def publish_directory(
    store: Store,
    kind: Kind,
    directory: Path,
    parents: Sequence[Parent] = (),
    meta: Mapping[str, Any] | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Store every file below `directory` as an artifact; its digest. `tell` hears of (bytes done, bytes in all) before each
    file and at the end, and may raise to stop."""
    files, paths = list[File](), sorted(p for p in directory.rglob("*") if p.is_file())
    total = sum(path.stat().st_size for path in paths)
    for path in paths:
        tell(sum(f.size for f in files), total)
        blob = store.put_file(path)
        files.append(File(path.relative_to(directory).as_posix(), blob.digest, blob.size))
    tell(total, total)
    return publish(store, Manifest(kind, tuple(files), tuple(parents), meta or {}))


def load(store: Store, digest: str) -> Manifest:
    """Read a manifest and verify it. NotFound (ARTIFACT_NOT_FOUND), DataLoss (MANIFEST_CORRUPT)."""
    found = store.get(f"manifests/{digest.removeprefix('sha256:')}.json")
    if found is None:
        raise NotFound(f"artifact {digest} is not in the store", reason="ARTIFACT_NOT_FOUND")
    if "sha256:" + hashlib.sha256(found.data).hexdigest() != digest:
        raise DataLoss(f"the manifest of {digest} is damaged", reason="MANIFEST_CORRUPT")
    data = json.loads(found.data)
    files = tuple(File(**f) for f in data["files"])
    return Manifest(data["kind"], files, tuple(Parent(**p) for p in data["parents"]), data["meta"])


def materialise(store: Store, manifest: Manifest, directory: Path, paths: Sequence[str] | None = None) -> Path:
    """Put an artifact's files (or only `paths`) below `directory`, verified; they must not be written to."""
    for f in manifest.files:
        if paths is None or f.path in paths:
            store.fetch_blob(f.digest, directory / check_path(f.path))
    return directory


def read_file(store: Store, manifest: Manifest, path: str) -> bytes:
    """A small file of an artifact, whole and verified."""
    f = manifest.file(path)
    data = b"".join(store.read_blob(f.digest))
    if "sha256:" + hashlib.sha256(data).hexdigest() != f.digest:
        raise DataLoss(f"{path}: stored bytes are damaged", reason="BLOB_CORRUPT", metadata={"path": path})
    return data


def stream_file(store: Store, file: File, offset: int = 0) -> Iterator[bytes]:
    """A file's bytes from `offset` on, in pieces of at most 1 MiB. OutOfRange (OFFSET_WRONG), and after the last byte
    DataLoss (BLOB_CORRUPT): by digest if the whole file was read, else by size."""
    if not 0 <= offset <= file.size:
        raise OutOfRange(f"{file.path} has {file.size} bytes, not {offset}", reason="OFFSET_WRONG")
    return _verified(store.read_blob(file.digest, offset), file, offset)


def _verified(pieces: Iterator[bytes], file: File, offset: int) -> Iterator[bytes]:
    whole, size = hashlib.sha256(), offset
    for piece in pieces:
        whole.update(piece)
        size += len(piece)
        yield piece
    if size != file.size or (offset == 0 and "sha256:" + whole.hexdigest() != file.digest):
        raise DataLoss(f"{file.path}: stored bytes are damaged", reason="BLOB_CORRUPT", metadata={"path": file.path})


def put_json_blob(store: Store, data: object) -> Blob:
    """Keep a JSON value as a blob."""
    return store.put_blob(json.dumps(data, sort_keys=True, ensure_ascii=False, indent=1).encode())


def get_ref(store: Store, name: str) -> Ref | None:
    """What a resource name stands for, or None."""
    found = store.get(f"refs/{name}.json")
    return Ref(name, json.loads(found.data), found.etag) if found else None


def put_ref(
    store: Store, name: str, body: Mapping[str, Any], *, if_match: str | None = None, if_absent: bool = False
) -> Ref:
    """Bind a name. Aborted (PRECONDITION_FAILED) as Store.put."""
    data = json.dumps(body, sort_keys=True, ensure_ascii=False).encode()
    return Ref(name, dict(body), store.put(f"refs/{name}.json", data, if_match=if_match, if_absent=if_absent))


def delete_ref(store: Store, name: str, *, if_match: str | None = None) -> None:
    """Unbind a name; the artifact stays until nothing names it."""
    store.delete(f"refs/{name}.json", if_match=if_match)


def list_refs(store: Store, prefix: str) -> Iterator[Ref]:
    """All refs directly below `prefix` (as ``workspaces/default/models/``), in order of their names."""
    start = ""
    while entries := store.list(f"refs/{prefix}", start_after=start):
        for entry in entries:
            name = entry.key.removeprefix("refs/").removesuffix(".json")
            if "/" not in name.removeprefix(prefix) and (ref := get_ref(store, name)):
                yield ref
        start = entries[-1].key


def free_bytes(directory: Path) -> int:
    """Bytes free on the disk that holds `directory`."""
    return shutil.disk_usage(directory).free
