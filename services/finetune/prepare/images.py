"""Images of rows: counted against their `<image>` marks, opened, and decoded within bounds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from services.finetune.formats import IMAGE, Problem, Row
from services.finetune.formats.carried import find
from services.finetune.vision import FORMATS

MAX_PIXELS = 25_000_000
"""Looked at before anything is decoded: a file of 10 kB may declare an image of hundreds of megabytes."""
MAX_RATIO = 200
"""Of an image's longer to its shorter side; what is thinner cannot be cut into patches."""
MAX_SIDE = 20_000
"""Pixels: an image may be padded to a square, which must still be quickly made small."""
_DRAFT = (224, 224)
"""A JPEG is decoded at the eighth of its size that is still as large: all its bytes are read, few pixels are made."""

REASONS = ("IMAGE_MARKS", "IMAGE_MISSING", "IMAGE_TOO_LARGE", "IMAGE_TOO_THIN", "IMAGE_INVALID")
Fault = tuple[str, str]
"""(UPPER_SNAKE reason, message)."""


class Images:
    """Looks at the images of rows; each file is opened once. `files` are the dataset's by path."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._faults: dict[str, Fault | None] = {}
        self.rows = self.named = 0

    @property
    def good(self) -> int:
        """Different images without a fault."""
        return sum(fault is None for fault in self._faults.values())

    def check(self, row: Row) -> list[Problem]:
        """What is wrong with the images of a row, by REASONS."""
        images = row.conversation.images
        marks = sum(m.content.count(IMAGE) for m in row.conversation.messages if m.role == "user") if images else 0
        if not images:
            return []
        self.rows += 1
        self.named += len(images)
        found = []
        if marks != len(images):
            message = f"{len(images)} images, but {marks} {IMAGE} marks in the user's turns; give one mark an image"
            found.append(Problem(row.file, row.row, "images", "IMAGE_MARKS", message))
        for n, name in enumerate(images):
            fault = self._fault(row.file, name)
            if fault is not None:
                found.append(Problem(row.file, row.row, f"images[{n}]", *fault))
        return found

    def paths(self, row: Row) -> list[str]:
        """The files of a row's images, all of which are there."""
        found = [find(row.file, name, self._files) for name in row.conversation.images]
        return [path for path in found if path is not None]

    def _fault(self, file: str, name: str) -> Fault | None:
        path = find(file, name, self._files)
        if path is None:
            return "IMAGE_MISSING", f"there is no file {name[:200]!r} in the dataset; upload it beside the rows"
        if path not in self._faults:
            self._faults[path] = check_image(self._files[path])
        return self._faults[path]


def check_image(path: Path | IO[bytes]) -> Fault | None:
    """What is wrong with an image file, on disk or in memory, None if it decodes. Memory stays below a few bytes a pixel of
    MAX_PIXELS. Not for several threads at a time: Python has one set of warnings' filters."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        # Damaged EXIF data, and the like, cost no pixel.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=FORMATS) as image:
                fault = _size_fault(*image.size)
                if fault is None:
                    image.draft("RGB", _DRAFT)
                    image.load()
                    ImageOps.exif_transpose(image, in_place=True)
                return fault
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return "IMAGE_TOO_LARGE", f"it declares more than {MAX_PIXELS / 1e6:.0f} million pixels; scale it down"
        except Exception as error:  # decoders raise whatever the broken byte leads to
            why = (str(error).splitlines() or [type(error).__name__])[0][:200]
            kinds = ", ".join(FORMATS)
            return "IMAGE_INVALID", f"it cannot be decoded as {kinds}: {why}; save it anew".replace(str(path), "it")


def _size_fault(width: int, height: int) -> Fault | None:
    if not width or not height or max(width, height) > MAX_RATIO * min(width, height):
        return (
            "IMAGE_TOO_THIN",
            f"{width} x {height}: the longer side is more than {MAX_RATIO} times the shorter; cut it",
        )
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        most = f"{MAX_PIXELS / 1e6:.0f} million pixels, or {MAX_SIDE} on a side"
        return "IMAGE_TOO_LARGE", f"{width} x {height} is more than {most}; scale it down"
    return None
