"""The model's own chat template: Jinja from its tokenizer, run in a sandbox, cut into pieces.

The template is rendered with a mark in place of each message's text. Where the marks come out shows which characters
were written by somebody and which are the template's; only the latter may become control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.finetune.formats import Conversation, Message
from services.finetune.templates import Piece, guard, with_system
from services.finetune.tokenizer import Tokenizer

# Private-use characters: no tokenizer's template writes them.
_MARK = "\ue000{}\ue001"
_MARKED = re.compile("\ue000(\\d+)\ue001")

Render = Callable[[Sequence[Message], bool], str]


class ChatTemplate:
    """See Template."""

    name = "tokenizer"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = _compile(str(tokenizer.chat_template))
        self.stop = tuple(tokenizer.decode([i], skip_special=False) for i in tokenizer.eos_ids)
        end = self._end_of_turn()
        if end and end not in self.stop:
            self.stop = (*self.stop, end)

    def pieces(self, conversation: Conversation, system: str = "") -> list[Piece]:
        return self._cut(with_system(conversation.messages, system))

    def prompt(self, messages: Sequence[Message], system: str = "") -> list[Piece]:
        return self._cut(with_system(messages, system))

    def whole(self, conversation: Conversation, system: str = "") -> str:
        """A whole conversation in one rendering, as the template writes it."""
        return self._render_plain(with_system(conversation.messages, system), False)

    def jinja(self) -> str:
        return str(self._tokenizer.chat_template)

    def _cut(self, messages: list[Message]) -> list[Piece]:
        """Render the growing conversation; what each answer adds after its generation prompt is that answer's."""
        marked = self._marks(messages)
        render = self._render_marked if marked else self._render_plain
        texts = [m.content.strip() for m in messages] if marked else []
        found: list[Piece] = []
        done = whole = ""
        for n, message in enumerate(messages):
            if message.role == "assistant":
                asked, whole = render(messages[:n], True), render(messages[: n + 1], False)
                found += _pieces(_after(done, asked), texts, False)
                answer = _after(asked, whole)
                cut = self._end(answer)
                found += _pieces(answer[:cut], texts, message.trained)
                done = asked + answer[:cut]
        if messages and messages[-1].role != "assistant":
            whole = render(messages, True)
        found += _pieces(_after(done, whole), texts, False)
        return guard(found, self._tokenizer)

    def _end(self, answer: str) -> int:
        """Where an answer's end-of-turn token ends: it is learned, what the template writes after it is not."""
        marks = list(_MARKED.finditer(answer))
        start = marks[-1].end() if marks else 0
        # A model whose end of sequence is another token than its end of turn still ends with a special token.
        for stops in (self.stop, self._tokenizer.special_texts):
            ends = [at + len(s) for s in stops if s and (at := answer.find(s, start)) >= 0]
            if ends:
                return min(ends)
        return len(answer)

    def _end_of_turn(self) -> str:
        """The special token that the template writes after an answer, "" if there is none."""
        try:
            text = self._render_marked([Message("user", "q"), Message("assistant", "a")], False)
        except InvalidArgument:
            return ""
        after = text.rpartition("\ue001")[2]
        found = [(at, s) for s in self._tokenizer.special_texts if (at := after.find(s)) >= 0]
        return min(found)[1] if found else ""

    def _marks(self, messages: list[Message]) -> bool:
        """Whether marks can stand for the texts: not if the template looks inside them, beyond trimming."""
        stages = [(messages, True)] if messages and messages[-1].role != "assistant" else []
        for n, message in enumerate(messages):
            if message.role == "assistant":
                stages += [(messages[:n], True), (messages[: n + 1], False)]
        if all(self._agrees(turns, prompt) for turns, prompt in stages):
            return True
        if any(self._tokenizer.controls(m.content) for m in messages):
            raise InvalidArgument(
                "a message holds the text of a special token, and the model's chat template rewrites messages, so the "
                "two cannot be told apart; remove it from the message",
                reason="TEXT_INVALID",
            )
        return False

    def _agrees(self, messages: list[Message], prompt: bool) -> bool:
        texts = [m.content.strip() for m in messages]
        marked = self._render_marked(messages, prompt)
        if any(int(n) >= len(texts) for n in _MARKED.findall(marked)):
            return False
        return _MARKED.sub(lambda m: texts[int(m[1])], marked) == self._render_plain(messages, prompt)

    def _render_plain(self, messages: Sequence[Message], prompt: bool) -> str:
        return self._run([m.content for m in messages], messages, prompt)

    def _render_marked(self, messages: Sequence[Message], prompt: bool) -> str:
        """White space around a text stays beside its mark, as templates often trim it."""
        texts = []
        for n, message in enumerate(messages):
            core = message.content.strip()
            texts.append(message.content.replace(core, _MARK.format(n), 1) if core else message.content)
        return self._run(texts, messages, prompt)

    def _run(self, texts: list[str], messages: Sequence[Message], prompt: bool) -> str:
        turns = [{"role": m.role, "content": text} for m, text in zip(messages, texts, strict=True)]
        # The same names as transformers gives: templates test `tools is not none`.
        names = {"bos_token": self._tokenizer.bos_token, "eos_token": self._tokenizer.eos_token}
        try:
            return str(
                self._template.render(messages=turns, add_generation_prompt=prompt, tools=None, documents=None, **names)
            )
        except Exception as error:  # the template is foreign code: whatever it raises is its refusal
            raise InvalidArgument(
                f"the model's chat template refuses this conversation: {error}", reason="TEMPLATE_REFUSED"
            ) from error


def _pieces(text: str, texts: list[str], trained: bool) -> list[Piece]:
    """Pieces of a rendered text; `texts` are what its marks stand for, none if it has no marks."""
    found = []
    for n, part in enumerate(_MARKED.split(text) if texts else [text]):
        if n % 2:
            found.append(Piece(texts[int(part)], trained, True, authored=True))
        elif part:
            found.append(Piece(part, trained, True))
    return [replace(found[0], begins=True), *found[1:]] if found else []


def _after(start: str, text: str) -> str:
    if not text.startswith(start):
        raise FailedPrecondition(
            "the model's chat template rewrites earlier turns when later ones come, so answers cannot be told from "
            "prompts; name a template in its place",
            reason="TEMPLATE_MISSING",
        )
    return text[len(start) :]


def _compile(source: str) -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """transformers' {% generation %} … {% endgeneration %} around answers: here they are found without it."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it as a plain set

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    # The same switches and helpers as transformers' apply_chat_template, so that templates mean the same.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise FailedPrecondition(f"the model's chat template is broken: {error}", reason="TEMPLATE_MISSING") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
