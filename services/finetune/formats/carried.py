"""Which files beside the rows a row names: an image's relative path must be one of the artifact's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from services.finetune.errors import InvalidArgument
from services.finetune.formats import RowError
from services.finetune.store.artifacts import check_path

_LISTS = {"messages": "content", "conversations": "value", "conversation": "value"}


def find(file: str, path: str, carried: Collection[str]) -> str | None:
    """The artifact's file that `path` means in a row of `file`: from the row file's folder, or from one above it."""
    near = (str(folder / path) for folder in PurePosixPath(file).parents)
    return next((found for found in near if found in carried), None)


def lost_image(file: str, row: Mapping[str, Any], carried: Collection[str]) -> RowError | None:
    """What is wrong with the first image of a row that is no file of the artifact. What has a scheme (a URL, inline data)
    names no file, and is the format's to judge."""
    for field, path in images(row):
        if ":" in path.partition("/")[0]:
            continue
        plain = path.removeprefix("./")
        try:
            check_path(plain)
        except InvalidArgument as error:
            return RowError(field, "PATH_UNSAFE", error.message)
        if find(file, plain, carried) is None:
            return RowError(
                field, "IMAGE_MISSING", f"{path[:200]!r} is no file of this revision; upload it beside the rows"
            )
    return None


def images(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, path) of each image: `image` and `images` of a row, and image parts of its messages."""
    yield from _paths("image", row.get("image"))
    yield from _paths("images", row.get("images"))
    for name, content in _LISTS.items():
        turns = row.get(name)
        for n, turn in enumerate(turns if isinstance(turns, list) else ()):
            parts = turn.get(content) if isinstance(turn, Mapping) else None
            for k, part in enumerate(parts if isinstance(parts, list) else ()):
                if isinstance(part, Mapping):
                    where = f"{name}[{n}].{content}[{k}]"
                    yield from _paths(f"{where}.image_url", part.get("image_url"))
                    yield from _paths(f"{where}.image", part.get("image"))


def _paths(field: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for n, item in enumerate(value):
            yield from _paths(f"{field}[{n}]", item)
    elif isinstance(value, Mapping):
        for key in ("path", "url"):
            if isinstance(value.get(key), str) and value[key]:
                yield f"{field}.{key}", value[key]
    elif isinstance(value, str) and value:
        yield field, value
