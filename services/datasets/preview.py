"""Rows as training sees them: text, token ids, and what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from services.finetune.formats import Row

if TYPE_CHECKING:
    from services.finetune.templates import Template
    from services.finetune.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Shown:
    """A row as training sees it: text in (piece, learned), token ids, and for each whether it is learned."""

    row: Row
    pieces: list[tuple[str, bool]]
    ids: list[int]
    mask: list[bool]
    truncated: int


def show(row: Row, template: Template, tokenizer: Tokenizer, system: str, max_length: int) -> Shown:
    """A row in a template, cut at `max_length` tokens; 0 cuts nothing."""
    from services.finetune.templates import IMAGE_ID, encode

    pieces = template.pieces(row.conversation, system)
    encoded = encode(pieces, tokenizer, IMAGE_ID)
    cut = max(len(encoded.ids) - max_length, 0) if max_length else 0
    ids, mask = encoded.ids[: len(encoded.ids) - cut], encoded.mask[: len(encoded.ids) - cut]
    texts: list[tuple[str, bool]] = []
    if not cut:
        for trained, run in groupby(pieces, key=lambda p: p.trained):
            texts.append(("".join(p.text for p in run), trained))
    else:
        # What is left may end within a word or a character: the tokens tell, not the template.
        for trained, tokens in groupby(zip(ids, mask, strict=True), key=lambda t: t[1]):
            texts.append((tokenizer.decode([i for i, _ in tokens if i != IMAGE_ID], skip_special=False), trained))
    return Shown(row, texts, ids, mask, cut)
