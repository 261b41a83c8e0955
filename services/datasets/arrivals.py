"""Files on their way into a revision: their paths, archives among them, and the difference to a file that is there."""

from __future__ import annotations

import hashlib
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from services.finetune.errors import FailedPrecondition, InvalidArgument, Violation
from services.finetune.formats.archives import MAX_MEMBERS, Member, is_archive, members
from services.finetune.formats.containers import ENDINGS, is_row_file
from services.finetune.store import Store, artifacts, delta
from services.finetune.store.artifacts import File
from services.finetune.store.checks import check_digest, check_size, disk_errors

MAX_FILES = MAX_MEMBERS
MAX_PATHS_BYTES = 3 << 19
"""All paths of a revision together: with their digests they must fit a message of 4 MiB."""
IN_MEMORY_BYTES = 8 << 20


def check_paths(paths: Sequence[str]) -> None:
    """Whether files of these paths can lie in one folder, on any machine. InvalidArgument (PATH_UNSAFE, TOO_MANY_FILES)."""
    if len(paths) > MAX_FILES or sum(len(p.encode("utf-8", "replace")) for p in paths) > MAX_PATHS_BYTES:
        raise InvalidArgument(
            f"files: {len(paths)} are too many for one revision; it takes {MAX_FILES}, and {MAX_PATHS_BYTES >> 10} KiB of "
            "paths, at most: divide them",
            reason="TOO_MANY_FILES",
        )
    seen: dict[str, str] = {}
    for path in paths:
        artifacts.check_path(path)
        folded = _folded(path)
        if (other := seen.get(folded)) is not None:
            raise _unsafe(path, "stands twice" if other == path else f"differs from {other!r} in case only; rename one")
        seen[folded] = path
    for folded, path in seen.items():
        for folder in PurePosixPath(folded).parents:
            if str(folder) in seen:
                raise _unsafe(path, f"lies in {seen[str(folder)]!r}, which is a file")


def unpacked(store: Store, files: Sequence[File], scratch: Path) -> list[File]:
    """The files, each archive replaced by what is in it, beside where it stood. InvalidArgument (ARCHIVE_*, PATH_UNSAFE,
    TOO_MANY_FILES). The blobs of what is refused halfway stay without a name."""
    found: list[File] = []
    for file in files:
        if not is_archive(file.path):
            found.append(file)
            continue
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            archive = Path(folder) / "archive"
            store.fetch_blob(file.digest, archive)
            beside = PurePosixPath(file.path).parent
            for member in members(file.path, archive):
                path = str(beside / member.path)
                blob = _kept(store, member, Path(folder) / "member")
                found.append(File(path, blob[0], blob[1]))
    check_paths([f.path for f in found])
    return found


def compose(store: Store, base: File, delta_digest: str, digest: str, size: int, scratch: Path) -> None:
    """Store the file that `base` and a delta make. InvalidArgument (DELTA_MALFORMED, DIGEST_MISMATCH, SIZE_MISMATCH),
    FailedPrecondition (BLOB_MISSING)."""
    if store.stat_blob(delta_digest) is None:
        raise FailedPrecondition(
            f"the delta {delta_digest} is not uploaded", reason="BLOB_MISSING", metadata={"digest": delta_digest}
        )
    with tempfile.TemporaryDirectory(dir=scratch) as folder, disk_errors(scratch):
        old, change, new = (Path(folder) / name for name in ("old", "delta", "new"))
        store.fetch_blob(base.digest, old)
        store.fetch_blob(delta_digest, change)
        sha, found = hashlib.sha256(), 0
        with old.open("rb") as before, change.open("rb") as told, new.open("wb") as out:
            for piece in delta.apply(before, told):
                found += len(piece)
                if found > size:
                    break
                sha.update(piece)
                out.write(piece)
        check_size(found, size)
        check_digest("sha256:" + sha.hexdigest(), digest)
        store.put_file(new)


def sign(store: Store, file: File, scratch: Path) -> delta.Signature:
    """The chunks of a stored file."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / "file"
        store.fetch_blob(file.digest, path)
        with path.open("rb") as source:
            return delta.sign(source, file.size)


def _kept(store: Store, member: Member, aside: Path) -> tuple[str, int]:
    """(digest, size) of a member, once it is stored; a large one goes by way of the disk."""
    held = bytearray()
    for piece in member.pieces:
        held += piece
        if len(held) > IN_MEMORY_BYTES:
            return _kept_large(store, bytes(held), member.pieces, aside)
    blob = store.put_blob(bytes(held))
    return blob.digest, blob.size


def _kept_large(store: Store, head: bytes, rest: Iterable[bytes], aside: Path) -> tuple[str, int]:
    # What the disk says is blamed here; what the archive says passes through.
    with disk_errors(aside.parent):
        with aside.open("wb") as out:
            out.write(head)
            for piece in rest:
                out.write(piece)
        blob = store.put_file(aside)
        aside.unlink()
    return blob.digest, blob.size


def row_files(files: Sequence[File]) -> list[File]:
    """Those that hold rows. InvalidArgument (FORMAT_UNDETECTED) if none does."""
    found = [f for f in files if is_row_file(f.path)]
    if not found:
        names = ", ".join(f.path for f in files[:5])
        raise InvalidArgument(
            f"none of the files holds rows ({names[:300]}): rows are read from {ENDINGS}", reason="FORMAT_UNDETECTED"
        )
    return found


def local(store: Store, files: Sequence[File], folder: Path) -> Iterator[tuple[str, Path]]:
    """(path in the artifact, path on disk), each file fetched when it is its turn."""
    for n, file in enumerate(files):
        path = folder / str(n)
        store.fetch_blob(file.digest, path)
        yield file.path, path
        path.unlink()


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _unsafe(path: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"files: the path {path!r} {why}",
        reason="PATH_UNSAFE",
        metadata={"path": path[:200]},
        violations=[Violation(f"files[{path[:200]}].path", why, "PATH_UNSAFE")],
    )
