"""Files by reference: a dataset of the hub, an S3 prefix, a folder of this machine; each is copied into the store.

What may be referred to is the settings' to say, and never a URL. The service fetches, not a worker: it is bytes from one
place to another, which needs no model's memory, and only the service knows what is allowed (docs/decisions/0021).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, urlsplit

from services.datasets.arrivals import check_paths
from services.finetune.errors import InvalidArgument, NotFound, PermissionDenied
from services.finetune.store import Store
from services.finetune.store.artifacts import File
from services.finetune.store.checks import disk_errors

UNWANTED = (".py", ".gitattributes")
"""Code of a hub's dataset is never run, so it is not fetched either."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the settings let be imported: folders, S3 prefixes as store URIs, and the hub or not."""

    roots: Sequence[Path] = ()
    prefixes: Sequence[str] = ()
    hub: bool = False


@dataclass(frozen=True, slots=True)
class Imported:
    """How far an import has come, in bytes, and the file that is stored now."""

    done: int
    total: int
    file: File | None


@dataclass(frozen=True, slots=True)
class _Item:
    """A file that is elsewhere. `get` brings it to a folder; its digest, where that is known before, may save that."""

    path: str
    size: int
    get: Callable[[Path], Path]
    digest: str = field(default="")


def import_files(
    store: Store, allowed: Allowed, source: tuple[str, str], include: Sequence[str], scratch: Path
) -> Iterator[Imported]:
    """Store the files of a source, (kind, reference). See ImportFiles for the errors."""
    kind, reference = source
    listing = {"hub_id": _hub, "s3_uri": _s3, "directory": _directory}.get(kind)
    if listing is None:
        raise InvalidArgument("an import needs one of hub_id, s3_uri, directory", reason="SOURCE_MISSING")
    found = [item for item in listing(allowed, reference) if _wanted(item.path, include)]
    if not found:
        wanted = f" that matches {', '.join(include)[:200]}" if include else ""
        raise NotFound(f"{reference} holds no file{wanted}", reason="SOURCE_NOT_FOUND")
    check_paths([item.path for item in found])
    done, total = 0, sum(item.size for item in found)
    yield Imported(0, total, None)
    for item in found:
        file = _stored(store, item, scratch)
        done += file.size
        yield Imported(done, max(total, done), file)


def _wanted(path: str, include: Sequence[str]) -> bool:
    """Whether a file is taken: nothing hidden, no code, and what the patterns ask for."""
    hidden = any(part.startswith(".") for part in PurePosixPath(path).parts)
    return not hidden and not path.endswith(UNWANTED) and (not include or any(fnmatchcase(path, p) for p in include))


def _stored(store: Store, item: _Item, scratch: Path) -> File:
    blob = store.touch_blob(item.digest) if item.digest else None
    if blob is None:
        with tempfile.TemporaryDirectory(dir=scratch) as folder, disk_errors(scratch):
            blob = store.put_file(item.get(Path(folder)))
    return File(item.path, blob.digest, blob.size)


# ---- a folder ----


def _directory(allowed: Allowed, reference: str) -> Iterator[_Item]:
    path = Path(reference)
    real = path.resolve()
    if not path.is_absolute() or not _below_a_root(real, allowed.roots):
        raise _no_folder(path)
    if not real.exists():
        raise NotFound(f"{path} does not exist on the service's machine", reason="SOURCE_NOT_FOUND")
    with disk_errors(real):
        files = [real] if real.is_file() else sorted(p for p in real.rglob("*") if p.is_file())
    base = real.parent if real.is_file() else real
    for file in files:
        # A link must not lead out to what the caller may not read.
        if not _below_a_root(file.resolve(), allowed.roots):
            raise _no_folder(file)
        yield _Item(file.relative_to(base).as_posix(), file.stat().st_size, partial(_there, file))


def _there(file: Path, folder: Path) -> Path:
    """A file that need not be brought anywhere."""
    return file


def _below_a_root(real: Path, roots: Sequence[Path]) -> bool:
    return any(real.is_relative_to(root.resolve()) for root in roots)


def _no_folder(path: Path) -> PermissionDenied:
    return PermissionDenied(
        f"this service does not import from {path}; upload the files, or let its --import-roots name the place",
        reason="LOCAL_PATH_FORBIDDEN",
        metadata={"path": str(path)[:200]},
    )


# ---- S3 ----


def _s3(allowed: Allowed, reference: str) -> Iterator[_Item]:
    from services.finetune.store.s3 import S3Store

    wanted = urlsplit(reference)
    prefix = wanted.path.strip("/")
    odd = {"", ".", ".."} & set(prefix.split("/")) if prefix else set()
    if wanted.scheme != "s3" or not wanted.netloc or wanted.query or wanted.fragment or odd:
        raise InvalidArgument(
            f"not an S3 prefix: {reference[:200]!r}; write s3://bucket/prefix", reason="SOURCE_MALFORMED"
        )
    source = S3Store(_allowed_prefix(allowed.prefixes, wanted.netloc, prefix)._replace(path="/" + prefix).geturl())

    def get(key: str, size: int, folder: Path) -> Path:
        with (folder / "file").open("wb") as out:
            for piece in source.read(key, 0, size):
                out.write(piece)
        return folder / "file"

    for key, size in source.list_files():
        yield _Item(key.removeprefix(source.prefix), size, partial(get, key, size))


def _allowed_prefix(prefixes: Sequence[str], bucket: str, prefix: str) -> SplitResult:
    for allowed in map(urlsplit, prefixes):
        root = allowed.path.strip("/")
        if allowed.netloc == bucket and (not root or prefix == root or prefix.startswith(root + "/")):
            return allowed
    raise PermissionDenied(
        f"this service does not import from s3://{bucket}/{prefix}; let its --import-prefixes name the place",
        reason="S3_PREFIX_FORBIDDEN",
        metadata={"bucket": bucket, "prefix": prefix[:200]},
    )


# ---- the hub ----


def _hub(allowed: Allowed, reference: str) -> Iterator[_Item]:
    if not allowed.hub:
        raise PermissionDenied(
            "this service does not fetch from the hub; upload the files, or start it with --hub-datasets on",
            reason="HUB_FORBIDDEN",
        )
    name, _, revision = reference.partition("@")
    if name.count("/") != 1 or not all(name.split("/")) or ":" in name:
        raise InvalidArgument(f"not a hub id: {reference[:200]!r}; write OWNER/NAME", reason="SOURCE_MALFORMED")
    from services.finetune.store.hub import fetch_file, list_dataset

    commit, files = list_dataset(reference, name, revision)
    for path, size, digest in files:
        yield _Item(path, size, partial(fetch_file, reference, name, commit, path), digest)
