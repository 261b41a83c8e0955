"""Attention document by document, on processors: a block's samples do not see each other, so most of its scores are nothing.

Letters in shapes: B blocks, H heads, L tokens of a block, S size of a head.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from services.finetune.train.seeing import language_of

BY_DOCUMENT = "by_document"
"""Its name among transformers' kinds of attention."""


class Document(NamedTuple):
    """One sample's tokens in a block; `near` where a window may hide some of them from others."""

    block: int
    begin: int
    end: int
    near: bool


def attend_by_document(causal: Any) -> None:
    """Let the language model attend document by document, if it hands on to its attention what it is called with; when it
    is called without documents, as in sampling, it goes as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    inner = language_of(causal)
    given = inspect.signature(inner.forward).parameters.values()
    config = inner.config.get_text_config()
    if config._attn_implementation != "sdpa" or all(p.kind is not p.VAR_KEYWORD for p in given):
        return
    AttentionInterface.register(BY_DOCUMENT, attend)
    AttentionMaskInterface.register(BY_DOCUMENT, sdpa_mask)
    inner.set_attn_implementation(BY_DOCUMENT)


def attends_by_document(causal: Any) -> bool:
    """Whether the language model does, where it is called with documents."""
    return bool(language_of(causal).config.get_text_config()._attn_implementation == BY_DOCUMENT)


def documents(causal: Any, segments_BL: Tensor) -> dict[str, Any]:
    """What a model called by these blocks is given beside its masks; nothing if it does not attend document by document."""
    if not attends_by_document(causal):
        return {}
    config = causal.config.get_text_config()
    window = getattr(config, "sliding_window", None) or segments_BL.shape[1]
    found = []
    for block, segments_L in enumerate(segments_BL):
        lengths, begin = torch.unique_consecutive(segments_L, return_counts=True)[1].tolist(), 0
        for length in lengths:
            found.append(Document(block, begin, begin + length, length > window))
            begin += length
    return {"documents": found}


def attend(
    module: Any,
    query_BHLS: Tensor,
    key_BHLS: Tensor,
    value_BHLS: Tensor,
    mask: Tensor | None,
    documents: list[Document] | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """transformers' own attention, of each document alone: [B, L, H, S]. `mask` [B, 1, L, L] decides only where it is not
    simply causal."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    if documents is None or given.get("position_bias") is not None:
        return sdpa(module, query_BHLS, key_BHLS, value_BHLS, mask, **given)
    given["is_causal"] = True
    made = []
    for block, begin, end, near in documents:
        of, at = slice(block, block + 1), slice(begin, end)
        query, key, value = (t[of, :, at] for t in (query_BHLS, key_BHLS, value_BHLS))
        hidden = mask[of, :, at, at] if near and mask is not None else None
        made.append(sdpa(module, query, key, value, hidden, **given)[0])
    return torch.cat(made, 1).view(len(query_BHLS), -1, *made[0].shape[2:]), None
