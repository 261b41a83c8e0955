"""Conversations to texts to be tokenised, quickly.

A template writes conversations of one shape (roles, flags, white space around texts) alike, so what it wrote for one is
kept as a form with slots. Whatever could not be alike goes the slow way through the template itself: a text that could
become a special token, a shape that has not been seen to keep its texts whole, and, if the model's own chat template
does anything with texts but write them, a conversation that it, asked to render it once, writes otherwise than the form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any

from services.finetune.chat_template import ChatTemplate
from services.finetune.errors import QuartetError
from services.finetune.formats import Conversation, Message
from services.finetune.prepare.jinja import only_writes
from services.finetune.templates import Template, runs
from services.finetune.tokenizer import Tokenizer

Run = tuple[str, bool, bool]
"""text, trained, special: see templates.runs"""

MAX_FORMS = 4096
"""Shapes that are remembered."""
_SAID = ("system", "user", "assistant")
PROVEN = 3
"""Conversations of a shape that are compared with the slow way before its form is believed."""

# Everything of a message but its text: its shape, whatever fields messages get.
_SHAPE = attrgetter("role", *(f.name for f in fields(Message) if f.name not in ("role", "content")))
# Private-use characters that no chat template writes; not those with which chat_template marks.
_SLOT = "\ue010{}\ue011"
_SLOTS = re.compile("\ue010(\\d+)\ue011")


@dataclass(slots=True)
class _Form:
    """Runs, each of fixed texts and numbers of messages in turn. `left` conversations are still to be compared."""

    runs: list[tuple[list[str | int], bool]] | None
    left: int = PROVEN


class Renderer:
    """What `templates.runs(template.pieces(...), images)` gives, with a memory."""

    def __init__(self, template: Template, tokenizer: Tokenizer, system: str, images: bool = False) -> None:
        self._template, self._tokenizer, self._system, self._images = template, tokenizer, system, images
        self._whole = None
        if isinstance(template, ChatTemplate) and not only_writes(template.jinja()):
            self._whole = template.whole
        self._forms: dict[Any, _Form] = {}

    def runs(self, conversation: Conversation) -> list[Run]:
        """The texts of a conversation; raises what the template raises."""
        if (
            conversation.tools
            or conversation.images
            or any(m.role not in _SAID or m.calls for m in conversation.messages)
        ):
            return self._slow(conversation)
        cores = [m.content.strip() for m in conversation.messages]
        if not all(cores) or not all(map(self._tokenizer.harmless, cores)):
            return self._slow(conversation)
        form = self._form(conversation, cores)
        if form is None or form.runs is None:
            return self._slow(conversation)
        found = [("".join([p if type(p) is str else cores[p] for p in parts]), t, True) for parts, t in form.runs]  # type: ignore[index]
        if self._whole is not None and self._whole(conversation, self._system) != "".join([r[0] for r in found]):
            return self._slow(conversation)
        if form.left:
            form.left -= 1
            if (slow := self._slow(conversation)) != found:
                form.runs = None
                return slow
        return found

    def _slow(self, conversation: Conversation) -> list[Run]:
        return runs(self._template.pieces(conversation, self._system), self._images)

    def _form(self, conversation: Conversation, cores: Sequence[str]) -> _Form | None:
        """The form of this shape, None if there are too many shapes or this one has parts that cannot be compared."""
        messages = conversation.messages
        around = [tuple(m.content.split(core, 1)) for m, core in zip(messages, cores, strict=True) if m.content != core]
        shape = (*map(_SHAPE, messages), *around, *(m.content == c for m, c in zip(messages, cores, strict=True)))
        try:
            form = self._forms.get(shape)
        except TypeError:
            return None
        if form is None and len(self._forms) < MAX_FORMS:
            form = self._forms[shape] = _Form(self._learn(messages, cores))
        return form

    def _learn(self, messages: Sequence[Message], cores: Sequence[str]) -> list[tuple[list[str | int], bool]] | None:
        """The form, if the template leaves texts whole."""
        probes = [
            replace(m, content=m.content.replace(core, _SLOT.format(n), 1))
            for n, (m, core) in enumerate(zip(messages, cores, strict=True))
        ]
        try:
            texts = runs(self._template.pieces(Conversation(tuple(probes)), self._system))
        except QuartetError:
            return None
        parts = [[int(p) if n % 2 else p for n, p in enumerate(_SLOTS.split(text))] for text, _, _ in texts]
        torn = any(isinstance(p, str) and "\ue010" in p for run in parts for p in run)
        if torn or not all(special for _, _, special in texts):
            return None
        return [([p for p in run if p != ""], trained) for run, (_, trained, _) in zip(parts, texts, strict=True)]
