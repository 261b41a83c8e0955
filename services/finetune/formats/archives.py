"""Archives: zip and tar, unpacked member by member. Only plain files come out, within bounds, and never onto a disk: what
a member is called is checked here and decided by the caller.

Memory is bounded by one piece and the archive's own list of members; an archive that is refused may have given members
before, so a caller keeps none of them until the end.
"""

from __future__ import annotations

import contextlib
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from services.finetune.errors import InvalidArgument, Violation, blamed
from services.finetune.formats.unpacking import MAX_RATIO, PackedError, most_bytes, open_packed
from services.finetune.store.artifacts import check_path

ZIP, TARS = ".zip", {".tar": "", ".tar.gz": "gz", ".tgz": "gz", ".tar.zst": "zst"}
OTHERS = (".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".7z", ".rar")

MAX_MEMBERS = 20_000
PIECE_BYTES = 1 << 20
LIST_BYTES = 4 << 20
"""Most bytes of a zip's directory, and of what a tar says between two files: names, not content."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive; `pieces` are its bytes, to be taken before the next member."""

    path: str
    pieces: Iterator[bytes]


def is_archive(file: str) -> bool:
    """Whether a file of this name is unpacked. InvalidArgument (ARCHIVE_UNSUPPORTED) for a kind that is not read."""
    name = file.lower()
    if name.endswith(OTHERS):
        raise InvalidArgument(
            f"{file}: this kind of archive is not read; pack it as .zip, .tar, .tar.gz or .tar.zst",
            reason="ARCHIVE_UNSUPPORTED",
            violations=[
                Violation(f"files[{file}]", "pack it as .zip, .tar, .tar.gz or .tar.zst", "ARCHIVE_UNSUPPORTED")
            ],
        )
    return name.endswith((ZIP, *TARS))


def members(file: str, path: Path) -> Iterator[Member]:
    """The files in the archive at `path`; `file` is its name, whose ending tells the kind.

    InvalidArgument: ARCHIVE_INVALID (damaged, cut off, encrypted), ARCHIVE_UNSAFE (links, devices, overlaps, archives
    within), ARCHIVE_TOO_LARGE (a bomb, or too many members), PATH_UNSAFE; each blames ``files[file].members[path]``.
    """
    with _blamed(file):
        yield from _zip(file, path) if file.lower().endswith(ZIP) else _tar(file, path)


@contextlib.contextmanager
def _blamed(file: str) -> Iterator[None]:
    """What the libraries say about an archive, in our words."""
    try:
        yield
    except PackedError as error:
        reason = "ARCHIVE_TOO_LARGE" if error.reason == "FILE_TOO_LARGE" else "ARCHIVE_INVALID"
        raise _refused(file, "", reason, error.message) from error
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, struct.error, NotImplementedError) as error:
        text = (str(error).splitlines() or ["it ends too soon"])[0][:200]
        raise _refused(file, "", "ARCHIVE_INVALID", f"it is damaged or cut off ({text}); pack it again") from error


def _refused(file: str, member: str, reason: str, why: str) -> InvalidArgument:
    shown = member.encode("utf-8", "backslashreplace").decode()[:200]
    field = f"files[{file}]" + (f".members[{shown}]" if member else "")
    return blamed(field, why, reason)


def _checked(file: str, member: str) -> str:
    """A member's path, as it may stand in a revision."""
    while member.startswith("./"):
        member = member[2:]
    try:
        check_path(member)
    except InvalidArgument as error:
        why = "the path leads out of the archive or holds odd characters; pack it again from within its folder"
        raise _refused(file, member, "PATH_UNSAFE", why) from error
    if member.lower().endswith((ZIP, *TARS, *OTHERS)):
        raise _refused(file, member, "ARCHIVE_UNSAFE", "an archive within an archive is not unpacked; upload it beside")
    return member


def _too_many(file: str, count: int) -> InvalidArgument:
    why = f"it has {count} members or more, and {MAX_MEMBERS} are unpacked at most; divide it"
    return _refused(file, "", "ARCHIVE_TOO_LARGE", why)


# ---- zip ----


def _zip(file: str, path: Path) -> Iterator[Member]:
    with path.open("rb") as source:
        _check_directory(file, source, path.stat().st_size)
        with zipfile.ZipFile(source) as archive:
            infos = [i for i in archive.infolist() if not i.is_dir()]
            if len(archive.infolist()) > MAX_MEMBERS:
                raise _too_many(file, len(archive.infolist()))
            paths = [_check_info(file, info) for info in archive.infolist()]
            _check_sizes(file, infos, path.stat().st_size, archive.start_dir)
            for info, name in zip(archive.infolist(), paths, strict=True):
                if not info.is_dir():
                    yield Member(name, _zip_pieces(file, archive, info))


def _check_directory(file: str, source: BinaryIO, size: int) -> None:
    """Refuse a directory that is too long before the library reads it into memory: its size stands at the end."""
    source.seek(max(size - 65_557, 0))
    tail = source.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + 22:
        raise _refused(file, "", "ARCHIVE_INVALID", "it is no zip file, or is cut off; pack it again")
    (length,) = struct.unpack_from("<I", tail, at + 12)
    if (wide := tail.rfind(b"PK\6\6", 0, at)) >= 0 and len(tail) >= wide + 56:
        length = max(length if length != 0xFFFFFFFF else 0, *struct.unpack_from("<Q", tail, wide + 40))
    if length > LIST_BYTES:
        raise _too_many(file, length // 200)


def _check_info(file: str, info: zipfile.ZipInfo) -> str:
    # The library cuts a name at a NUL; what was written is what is judged.
    name = _checked(file, info.orig_filename.rstrip("/") if info.is_dir() else info.orig_filename)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _refused(file, name, "ARCHIVE_UNSAFE", "it is a link or a device; pack plain files")
    if info.flag_bits & 0x1:
        raise _refused(file, name, "ARCHIVE_INVALID", "it is encrypted; pack it without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _refused(file, name, "ARCHIVE_INVALID", "its compression is not read; pack it with deflate")
    return name


def _check_sizes(file: str, infos: list[zipfile.ZipInfo], size: int, directory: int) -> None:
    """No bomb by what it says (the library gives no more than that), and no two members from the same bytes."""
    most, total = most_bytes(size), 0
    end, last = 0, ""
    for info in sorted(infos, key=lambda i: i.header_offset):
        total += info.file_size
        if total > most:
            why = (
                f"it unpacks to more than {most >> 20} MiB, over {MAX_RATIO} times its size; divide it, or upload files"
            )
            raise _refused(file, info.filename, "ARCHIVE_TOO_LARGE", why)
        if info.header_offset < end:
            raise _refused(file, info.filename, "ARCHIVE_UNSAFE", f"its bytes are those of {last!r} too; pack it again")
        end, last = info.header_offset + 30 + info.compress_size, info.filename
    if end > directory:
        raise _refused(file, last, "ARCHIVE_UNSAFE", "its bytes reach into the archive's directory; pack it again")


def _zip_pieces(file: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    found = 0
    # The caller takes the pieces, so what goes wrong here does not pass through `members`.
    with _blamed(file), archive.open(info) as source:
        while piece := source.read(PIECE_BYTES):
            found += len(piece)
            yield piece
    if found != info.file_size:
        raise _refused(file, info.filename, "ARCHIVE_INVALID", f"it has {found} bytes, not {info.file_size} as told")


# ---- tar ----


class _Talk:
    """A tar's bytes. Between two files it may say little: long names and tables would otherwise fill the memory."""

    def __init__(self, file: str, source: BinaryIO) -> None:
        self._file, self._source = file, source
        self.said = 0

    def read(self, count: int) -> bytes:
        data = self._source.read(count)
        self.said += len(data)
        if self.said > LIST_BYTES:
            raise _refused(self._file, "", "ARCHIVE_UNSAFE", "a header in it is too long; pack it again")
        return data


def _tar(file: str, path: Path) -> Iterator[Member]:
    packed = next(packed for ending, packed in TARS.items() if file.lower().endswith(ending))
    with open_packed(path, packed) as plain:
        talk: Any = _Talk(file, plain)
        # A stream: read once and forward.
        with tarfile.open(fileobj=talk, mode="r|", errorlevel=2) as archive:
            count = 0
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # the library would keep all
                count += 1
                if count > MAX_MEMBERS:
                    raise _too_many(file, count)
                if info.isdir() and info.name.strip("./") == "":
                    continue
                name = _checked(file, info.name)
                if not (info.isreg() or info.isdir()) or info.issparse():
                    raise _refused(
                        file, name, "ARCHIVE_UNSAFE", "it is a link, a device or a sparse file; pack plain files"
                    )
                if info.isreg():
                    yield Member(name, _tar_pieces(file, archive, info, talk))
                talk.said = 0


def _tar_pieces(file: str, archive: tarfile.TarFile, info: tarfile.TarInfo, talk: _Talk) -> Iterator[bytes]:
    found = 0
    with _blamed(file):
        source = archive.extractfile(info)
        while source is not None and (piece := source.read(PIECE_BYTES)):
            talk.said = 0
            found += len(piece)
            yield piece
    if found != info.size:
        raise _refused(file, info.name, "ARCHIVE_INVALID", f"it ends after {found} of {info.size} bytes; pack it again")
