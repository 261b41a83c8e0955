"""Forms of answers by llguidance, the same for both engines: vLLM has it inside, the transformers engine asks `Follower`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import llguidance.numpy
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from services.finetune.errors import blamed
from services.inference.engines.port import Form

MAX_BYTES = 64 << 10
"""Of a form: compiling takes time that grows with it, in the server's own loop."""


def check_form(form: Form) -> None:
    """InvalidArgument (FORM_INVALID)."""
    why = f"has more than {MAX_BYTES} bytes" if len(form.text.encode()) > MAX_BYTES else ""
    if not why:
        try:
            why = LLMatcher.validate_grammar(_compiled(form))
        except ValueError as error:
            why = str(error)
    if why:
        raise blamed(f"sampling.{form.kind}", why.strip().splitlines()[0][:300], "FORM_INVALID")


def _compiled(form: Form) -> str:
    if form.kind == "json_schema":
        # Free blanks are where a small model gets lost: it may go on with them for ever.
        return LLMatcher.grammar_from_json_schema(form.text, defaults={"whitespace_flexible": False})
    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(form.text)
    return LLMatcher.grammar_from_lark(form.text)


class Vocabulary:
    """A model's tokens as llguidance wants them; costly to make, shared by all answers that end by the same tokens."""

    def __init__(self, folder: Path, size: int, eos_ids: Sequence[int]) -> None:
        self.size = size
        self.tokens = LLTokenizer((folder / "tokenizer.json").read_text(), n_vocab=size, eos_token=list(eos_ids))


class Follower:
    """What one answer may go on with."""

    def __init__(self, vocabulary: Vocabulary, form: Form) -> None:
        self._matcher = LLMatcher(vocabulary.tokens, _compiled(form), log_level=0)
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocabulary.size)

    def allow(self, logits_V: Tensor) -> Tensor:
        """`logits_V` (on the CPU) with what would break the form at minus infinity; only ends are left when it is done."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask)
        allowed = logits_V.clone().numpy()
        llguidance.numpy.apply_token_bitmask_inplace(allowed, self._mask)
        return torch.from_numpy(allowed)

    def push(self, token: int) -> None:
        self._matcher.consume_token(token)
