"""What is dropped from the store in a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from services.finetune.store.port import Leftover, Stored


def list_blobs(root: Path) -> Iterator[Stored]:
    """See Store."""
    for folder in sorted(os.listdir(root / "blobs" / "sha256")):
        with os.scandir(root / "blobs" / "sha256" / folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    yield Stored(f"sha256:{entry.name}", stat.st_size, stat.st_mtime)


def leftovers(root: Path, before_s: float, drop: bool) -> Iterator[Leftover]:
    """See Store. A writer whose upload is taken from under it is told so, and begins again."""
    for folder in (root / "uploads").iterdir():
        with contextlib.suppress(FileNotFoundError):
            stats = [path.stat() for path in (folder, *folder.iterdir())]
            if max(s.st_mtime for s in stats) < before_s:
                if drop:
                    shutil.rmtree(folder, ignore_errors=True)
                yield Leftover("upload", folder.name, sum(s.st_size for s in stats[1:]))
    for path in (root / "tmp").iterdir():
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            if path.name != "lock" and stat.st_mtime < before_s:
                if drop:
                    path.unlink()
                yield Leftover("temporary", path.name, stat.st_size)
