"""RefCOCO's rows, as XTuner's `preprocess refcoco` writes them: where something is in an image, or what is there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from services.finetune.formats import IMAGE, Conversation, Message, RowError
from services.finetune.formats.fields import Turns, text
from services.finetune.formats.images import place_images

_WHERE = (
    "[refer] {}",
    "[refer] give me the location of {}",
    "[refer] where is {} ?",
    "[refer] from this image, tell me the location of {}",
    "[refer] the location of {} is",
    "[refer] could you tell me the location for {} ?",
    "[refer] where can I locate the {} ?",
)
_WHAT = (
    "[identify] {}",
    "[identify] what object is in this location {}",
    "[identify] identify the object present at this location {}",
    "[identify] what is it in {}",
    "[identify] describe this object in {}",
    "[identify] this {} is",
    "[identify] the object in {} is",
)


def refcoco(row: Mapping[str, Any]) -> Conversation:
    """XTuner asks each of seven questions about a row; here the row decides which of them."""
    return _asked(row, _WHERE, text(row, "sents", "sents"), _box(row))


def refcoco_inverse(row: Mapping[str, Any]) -> Conversation:
    """The other way round: what is in the box."""
    return _asked(row, _WHAT, _box(row), text(row, "sents", "sents"))


def _asked(row: Mapping[str, Any], questions: Sequence[str], given: str, answer: str) -> Conversation:
    drawn = hashlib.blake2b(f"{row.get('image')} {given} {answer}".encode(errors="surrogatepass"), digest_size=8)
    question = questions[int.from_bytes(drawn.digest(), "little") % len(questions)].format(given)
    turns = Turns()
    turns.add(Message("user", f"{IMAGE}\n{question}"), "sents")
    turns.add(Message("assistant", answer), "sents")
    return turns.checked("sents", (), place_images(row, turns, "marked"))


def _box(row: Mapping[str, Any]) -> str:
    """x, y of both corners in hundredths of the image's width and height; `bbox` is x, y, width, height in pixels."""
    box, size = row.get("bbox"), [row.get("width"), row.get("height")]
    numbers = [*box, *size] if isinstance(box, list | tuple) else []
    if len(numbers) != 6 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        message = "bbox must be four numbers, and width and height one each: x, y, width, height in pixels of the image"
        raise RowError("bbox", "FIELD_TYPE", message)
    x, y, w, h, width, height = numbers
    if not (width > 0 and height > 0 and 0 <= x <= x + w <= width and 0 <= y <= y + h <= height):
        raise RowError("bbox", "FIELD_TYPE", "bbox is not inside the image's width and height")
    corners = (x / width, y / height, (x + w) / width, (y + h) / height)
    return "{" + "".join(f"<{int(c * 100)}>" for c in corners) + "}"
