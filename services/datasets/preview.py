"""Rows as training sees them: text, token ids, and what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from services.finetune.formats import Row

if TYPE_CHECKING:
    from services.finetune.templates import Template
    from services.finetune.tokenizer import Tokenizer
    from services.finetune.vision import ImageForm


@dataclass(frozen=True, slots=True)
class Shown:
    """A row as training sees it: text in (piece, learned), token ids, and for each whether it is learned."""

    row: Row
    pieces: list[tuple[str, bool]]
    ids: list[int]
    mask: list[bool]
    truncated: int


def show(
    row: Row, template: Template, tokenizer: Tokenizer, form: ImageForm | None, system: str, max_length: int
) -> Shown:
    """A row in a template, cut at `max_length` tokens; 0 cuts nothing. A model of no form shows an image as IMAGE_ID."""
    from services.finetune.templates import IMAGE_ID, Encoded, encode
    from services.finetune.vision import spread

    pieces = template.pieces(row.conversation, system)
    encoded = encode(pieces, tokenizer, IMAGE_ID)
    if form is not None:
        whole, left = spread(encoded, form), spread(encoded, form, max_length)
    else:
        whole, end = encoded, max_length or len(encoded.ids)
        left = Encoded(whole.ids[:end], whole.mask[:end])
    ids, mask, cut = left.ids, left.mask, len(whole.ids) - len(left.ids)
    texts: list[tuple[str, bool]] = []
    if not cut:
        for trained, run in groupby(pieces, key=lambda p: p.trained):
            texts.append(("".join(p.text for p in run), trained))
    else:
        # What is left may end within a word or a character: the tokens tell, not the template.
        for trained, tokens in groupby(zip(ids, mask, strict=True), key=lambda t: t[1]):
            seen = [i for i, _ in tokens if i not in (IMAGE_ID, form and form.token_id)]
            texts.append((tokenizer.decode(seen, skip_special=False), trained))
    return Shown(row, texts, ids, mask, cut)
