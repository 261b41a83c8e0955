"""Images of a row: files by relative path, and the <image> marks in questions that stand for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from services.finetune.formats import IMAGE, RowError
from services.finetune.formats.fields import Turns, is_text

Images = Literal["", "marked", "only"]
"""What a format does with <image>: "" takes it for a text in a row without images; "only" keeps nothing else."""


def place_images(row: Mapping[str, Any], turns: Turns, images: Images) -> tuple[str, ...]:
    """The files of `image` or `images`, counted against the marks of the questions in `turns`.

    A single mark in a question is moved to its start, on a line of its own, as XTuner does.
    """
    files = _files(row)
    marks = 0
    for n, message in enumerate(turns.messages):
        if message.role != "user":
            continue
        found = message.content.count(IMAGE)
        marks += found
        if images == "only" and not found:
            field = turns.fields[n]
            raise RowError(field, "IMAGE_COUNT", f"{field} has no {IMAGE} mark; this format keeps nothing else of it")
        if images == "only":
            turns.messages[n] = replace(message, content=IMAGE * found)
        elif found == 1 and files:
            rest = message.content.replace(IMAGE, "").strip()
            turns.messages[n] = replace(message, content=f"{IMAGE}\n{rest}".strip())
    if marks != len(files) and (files or images):
        field = "images" if row.get("images") is not None else "image"
        why = f"the questions hold {marks} {IMAGE} marks, but {field} names {len(files)}; each image needs one mark"
        raise RowError(field, "IMAGE_COUNT", why)
    return files


def _files(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = "images" if row.get("images") is not None else "image"
    given = row.get(name)
    if given is None or given == "":  # a row of a CSV file without an image
        return ()
    if not isinstance(given, list | tuple):
        return (_path(given, name),)
    return tuple(_path(file, f"{name}[{n}]") for n, file in enumerate(given))


def _path(value: Any, at: str) -> str:
    """A path below the data set's folder: no web address, nothing that leads out of it."""
    file = is_text(value, at)
    odd = "://" in file or "\\" in file or file.startswith("/") or any(ord(c) < 32 for c in file)
    if odd or any(part in ("", ".", "..") for part in file.split("/")):
        message = f"{at} is {file[:80]!r}; name a file of the data set by its path in it, as images/1.jpg"
        raise RowError(at, "IMAGE_PATH", message)
    return file
