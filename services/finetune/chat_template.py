"""The model's own chat template: Jinja from its tokenizer, run in a sandbox, cut into pieces.

The template is rendered with a mark in place of each message's text. Where the marks come out shows which characters
were written by somebody and which are the template's; only the latter may become control tokens. Tools and calls, which a
template writes as JSON, cannot be marked: they must not hold the text of a special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.finetune.formats import Conversation, Message
from services.finetune.templates import Piece, Tool, guard, image_pieces, text_pieces, with_system
from services.finetune.tokenizer import Tokenizer

# Private-use characters: no tokenizer's template writes them.
_MARK = "\ue000{}\ue001"
_MARKED = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True, slots=True)
class _Talk:
    """What is rendered: turns and the tools on offer; with `images`, users' <image> marks are images."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    images: bool = False

    def first(self, n: int) -> _Talk:
        return replace(self, messages=self.messages[:n])

    def stages(self) -> Iterator[tuple[_Talk, bool]]:
        """Every (turns, with the generation prompt) that cutting renders."""
        for n, message in enumerate(self.messages):
            if message.role == "assistant":
                yield self.first(n), True
                yield self.first(n + 1), False
        if self.messages and self.messages[-1].role != "assistant":
            yield self, True


CLOCK: ContextVar[datetime | None] = ContextVar("CLOCK", default=None)
"""What a template that asks for the time is told; None is the present. A parity certificate must not change by the day."""


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
        messages = with_system(conversation.messages, system)
        return self._cut(_Talk(messages, conversation.tools, bool(conversation.images)))

    def prompt(
        self, messages: Sequence[Message], system: str = "", tools: Sequence[Tool] = (), images: bool = False
    ) -> list[Piece]:
        return self._cut(_Talk(with_system(messages, system), tools, images))

    def whole(self, conversation: Conversation, system: str = "") -> str:
        """A whole conversation in one rendering, as the template writes it."""
        return self._render_plain(_Talk(with_system(conversation.messages, system)), False)

    def jinja(self) -> str:
        return str(self._tokenizer.chat_template)

    def _cut(self, talk: _Talk) -> list[Piece]:
        """Render the growing conversation; what each answer adds after its generation prompt is that answer's."""
        messages = talk.messages
        if (text := text_pieces(messages, self._tokenizer)) is not None:
            return text
        if talk.tools or any(m.calls or m.role == "tool" for m in messages):
            self._check_tools(talk)
        marked = self._marks(talk)
        render = self._render_marked if marked else self._render_plain
        shown = talk if marked else replace(talk, messages=())
        found: list[Piece] = []
        done = whole = ""
        for n, message in enumerate(messages):
            if message.role == "assistant":
                asked, whole = render(talk.first(n), True), render(talk.first(n + 1), False)
                found += _pieces(_after(done, asked), shown, False)
                answer = _after(asked, whole)
                cut = self._end(answer)
                found += _pieces(answer[:cut], shown, message.trained)
                done = asked + answer[:cut]
        if messages and messages[-1].role != "assistant":
            whole = render(talk, True)
        found += _pieces(_after(done, whole), shown, False)
        return guard(found, self._tokenizer)

    def _check_tools(self, talk: _Talk) -> None:
        """Refuse a template that leaves tools out, and texts in them that could steer."""
        calls = [c for m in talk.messages for c in m.calls]
        if any(
            self._tokenizer.controls(text) for text in _texts([*talk.tools, *({c.name: c.arguments} for c in calls)])
        ):
            raise InvalidArgument(
                "a tool or a tool call holds the text of a special token; remove it", reason="TEXT_INVALID"
            )
        whole = self._render_plain(talk, False)
        left_out = [c.name for c in calls if c.name not in whole]
        if talk.tools and whole == self._render_plain(replace(talk, tools=()), False):
            left_out.append("the definitions")
        for message in talk.messages:
            text = message.content.strip()
            if message.role == "tool" and text not in whole and _tojson(text)[1:-1] not in whole:
                left_out.append("the results")
        if left_out:
            raise InvalidArgument(
                f"the model's chat template leaves tools out ({left_out[0]}): it has no place for them; use a model that "
                "was made for tools",
                reason="TOOLS_UNSUPPORTED",
            )

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
            text = self._render_marked(_Talk([Message("user", "q"), Message("assistant", "a")]), False)
        except InvalidArgument:
            return ""
        after = text.rpartition("\ue001")[2]
        found = [(at, s) for s in self._tokenizer.special_texts if (at := after.find(s)) >= 0]
        return min(found)[1] if found else ""

    def _marks(self, talk: _Talk) -> bool:
        """Whether marks can stand for the texts: not if the template looks inside them, beyond trimming."""
        if all(self._agrees(turns, prompt) for turns, prompt in talk.stages()):
            return True
        if talk.images:
            raise InvalidArgument(
                "the model's chat template rewrites messages, so the places of their images are lost; name a template "
                "in its place",
                reason="TEMPLATE_REFUSED",
            )
        if any(self._tokenizer.controls(m.content) for m in talk.messages):
            raise InvalidArgument(
                "a message holds the text of a special token, and the model's chat template rewrites messages, so the "
                "two cannot be told apart; remove it from the message",
                reason="TEXT_INVALID",
            )
        return False

    def _agrees(self, talk: _Talk, prompt: bool) -> bool:
        texts = [m.content.strip() for m in talk.messages]
        marked = self._render_marked(talk, prompt)
        if any(int(n) >= len(texts) for n in _MARKED.findall(marked)):
            return False
        return _MARKED.sub(lambda m: texts[int(m[1])], marked) == self._render_plain(talk, prompt)

    def _render_plain(self, talk: _Talk, prompt: bool) -> str:
        return self._run([m.content for m in talk.messages], talk, prompt)

    def _render_marked(self, talk: _Talk, prompt: bool) -> str:
        """White space around a text stays beside its mark, as templates often trim it."""
        texts = []
        for n, message in enumerate(talk.messages):
            core = message.content.strip()
            texts.append(message.content.replace(core, _MARK.format(n), 1) if core else message.content)
        return self._run(texts, talk, prompt)

    def _run(self, texts: list[str], talk: _Talk, prompt: bool) -> str:
        turns = [_turn(m, text) for m, text in zip(talk.messages, texts, strict=True)]
        # The same names as transformers gives: templates test `tools is not none`.
        names = {"bos_token": self._tokenizer.bos_token, "eos_token": self._tokenizer.eos_token}
        tools = list(talk.tools) or None
        try:
            return str(
                self._template.render(
                    messages=turns, add_generation_prompt=prompt, tools=tools, documents=None, **names
                )
            )
        except Exception as error:  # the template is foreign code: whatever it raises is its refusal
            raise InvalidArgument(
                f"the model's chat template refuses this conversation: {error}", reason="TEMPLATE_REFUSED"
            ) from error


def _turn(message: Message, text: str) -> dict[str, Any]:
    """A message as transformers gives it to templates: calls with their arguments as objects."""
    turn: dict[str, Any] = {"role": message.role, "content": text}
    if message.calls:
        turn["tool_calls"] = [
            {
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.calls
        ]
    if message.call_id:
        turn["tool_call_id"] = message.call_id
    if message.name:
        turn["name"] = message.name
    return turn


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _pieces(text: str, shown: _Talk, trained: bool) -> list[Piece]:
    """Pieces of a rendered text; the messages of `shown` are what its marks stand for, none if it has no marks."""
    found: list[Piece] = []
    for n, part in enumerate(_MARKED.split(text) if shown.messages else [text]):
        if n % 2:
            message = shown.messages[int(part)]
            piece = Piece(message.content.strip(), trained, True, authored=True)
            found += image_pieces(piece) if shown.images and message.role == "user" else [piece]
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

    from services.finetune.sandbox import Bounded

    class Generation(Extension):
        """transformers' {% generation %} … {% endgeneration %} around answers: here they are found without it."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it as a plain set

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    # The same switches and helpers as transformers' apply_chat_template, so that templates mean the same.
    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: (CLOCK.get() or datetime.now()).strftime(form)
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
