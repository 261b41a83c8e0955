"""Conversations to pieces of text with a loss flag, pieces to token ids and labels.

Two kinds of template stand behind one class: the model's own chat template (Jinja, sandboxed), and the named ones of
XTuner 0.2.0's table, as data. The ids of a prompt are always an exact prefix of the ids of the same conversation with
its answer, because both are cut into the same pieces. Only an assistant's text and its end-of-turn token are learned.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from services.finetune.errors import FailedPrecondition, InvalidArgument, nearest
from services.finetune.formats import IMAGE, Conversation, Message
from services.finetune.tokenizer import Tokenizer

IMAGE_ID = -200
"""Stands among token ids for an image, until a vision encoder's features take its place; no token has it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text. In a `special` piece the texts of special tokens are those tokens."""

    text: str
    trained: bool
    special: bool
    authored: bool = False
    """Somebody wrote it: it must not steer. `guard` makes it plain where it could."""
    begins: bool = False
    """It is not tokenised together with what stands before, so that the tokens do not depend on what is learned."""
    image: bool = False
    """An image stands here: one token, whatever the text."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and for each whether it is learned."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True, slots=True)
class Row:
    """A named template: {system}, {input} and {round} are filled in.

    `suffix` ends an answer and is learned. Without one, or with `eos`, the tokenizer's EOS ends it, and the next turn
    begins a text again. `sep` follows, not learned. Without `system` there is no place for a system text.
    """

    instruction: str
    system: str = ""
    suffix: str = ""
    eos: bool = False
    sep: str = ""
    stop: tuple[str, ...] = ()


def _table() -> dict[str, Row]:
    rows = tomllib.loads(Path(__file__).with_name("templates.toml").read_text("utf-8"))
    return {name: Row(**{**row, "stop": tuple(row.get("stop", ()))}) for name, row in rows.items()}


TEMPLATES: Mapping[str, Row] = _table()


Tool = Mapping[str, Any]
"""A tool's definition, as OpenAI writes it: {"type": "function", "function": {name, description, parameters}}."""


class Template(Protocol):
    """What training, preview and chat need of a template."""

    name: str
    stop: tuple[str, ...]

    def pieces(self, conversation: Conversation, system: str = "") -> list[Piece]:
        """A whole conversation. `system` is used when it has no system turn of its own.

        Raises InvalidArgument: TEMPLATE_REFUSED, TOOLS_UNSUPPORTED, TEXT_INVALID.
        """

    def prompt(
        self, messages: Sequence[Message], system: str = "", tools: Sequence[Tool] = (), images: bool = False
    ) -> list[Piece]:
        """A conversation that ends with a user's or a tool's turn, up to where the answer begins. With `images` the user's
        <image> marks are images. Raises as `pieces`."""

    def jinja(self) -> str:
        """An equal chat template, for exported models."""


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """A template by name; "" or "tokenizer" is the model's own.

    Raises InvalidArgument (TEMPLATE_UNKNOWN), FailedPrecondition (TEMPLATE_MISSING).
    """
    if name in ("", "tokenizer"):
        if not tokenizer.chat_template:
            raise FailedPrecondition(
                "the model has no chat template of its own; name one of " + ", ".join(TEMPLATES),
                reason="TEMPLATE_MISSING",
            )
        from services.finetune.chat_template import ChatTemplate

        return ChatTemplate(tokenizer)
    check_name(name)
    return _Named(name, tokenizer)


def check_name(name: str) -> None:
    """InvalidArgument (TEMPLATE_UNKNOWN) naming the nearest, unless `name` is a template's or "tokenizer"."""
    if name not in TEMPLATES and name != "tokenizer":
        known = ["tokenizer", *TEMPLATES]
        raise InvalidArgument(f"unknown template {name!r}{nearest(name, known)}", reason="TEMPLATE_UNKNOWN")


def encode(
    pieces: Sequence[Piece],
    tokenizer: Tokenizer,
    image_id: int | None = None,
    answered: Callable[[str], list[int]] | None = None,
) -> Encoded:
    """Token ids and loss mask; `answered` makes those of answers, in their order.

    `image_id` stands for an image; without one InvalidArgument (IMAGES_UNSUPPORTED) is raised where there is an image.
    """
    if image_id is not None and IMAGE in tokenizer.special_texts:
        return _encode_seen(pieces, tokenizer, image_id, answered or tokenizer.encode)
    ids: list[int] = []
    mask: list[bool] = []
    for image, group in groupby(pieces, key=lambda p: p.image):
        if image and image_id is not None:
            ids += [image_id for _ in group]
            mask += [False] * (len(ids) - len(mask))
            continue
        for text, trained, special in runs(list(group)):
            steering = answered if trained and answered else tokenizer.encode
            new = steering(text) if special else tokenizer.encode_plain(text)
            ids += new
            mask += [trained] * len(new)
    return Encoded(ids, mask)


def _encode_seen(
    pieces: Sequence[Piece], tokenizer: Tokenizer, image_id: int, answered: Callable[[str], list[int]]
) -> Encoded:
    """As `encode`, for a tokenizer that has a token for images: texts on both sides are tokenised as training does."""
    (token,) = tokenizer.encode(IMAGE)
    ids: list[int] = []
    mask: list[bool] = []
    for text, trained, special in runs(pieces, images=True):
        steering = answered if trained else tokenizer.encode
        new = steering(text) if special else tokenizer.encode_plain(text)
        ids += [image_id if i == token else i for i in new]
        mask += [trained] * len(new)
    return Encoded(ids, mask)


def runs(pieces: Sequence[Piece], images: bool = False) -> list[tuple[str, bool, bool]]:
    """(text, trained, special) of each text that is tokenised by itself: neighbours of one kind go together.

    With `images` the special text <image> stands for an image; else InvalidArgument (IMAGES_UNSUPPORTED) for one.
    """
    if not images and any(p.image for p in pieces):
        raise InvalidArgument(
            "the conversation holds an image, which this model cannot see; use a model with a vision encoder",
            reason="IMAGES_UNSUPPORTED",
        )
    found: list[tuple[str, bool, bool]] = []
    n = 0
    while n < len(pieces):
        first, text = pieces[n], ""
        while n < len(pieces) and (not text or not pieces[n].begins):
            if (pieces[n].trained, pieces[n].special) != (first.trained, first.special):
                break
            text += pieces[n].text
            n += 1
        found.append((text, first.trained, first.special))
    return found


def to_prompt_ids(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    system: str = "",
    tools: Sequence[Tool] = (),
    images: bool = False,
) -> list[int]:
    """What to feed for an answer to `messages`; with `images` an IMAGE_ID stands for each <image> mark of the user's."""
    pieces = template.prompt(messages, system, tools, images)
    said = _Said(messages, tokenizer)
    return encode(pieces, tokenizer, IMAGE_ID if images else None, said.ids).ids


class _Said:
    """Answers in the tokens in which they were said, which need not be those that their texts are tokenised to."""

    def __init__(self, messages: Sequence[Message], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # What an answer's text holds of control tokens is text, so but for its end an answer may have none.
        control = set(tokenizer.special_ids.values())
        fit = (m.ids for m in messages if control.isdisjoint(m.ids[:-1]))
        self._left = [(tokenizer.decode(ids, skip_special=False), ids) for ids in fit]

    def ids(self, text: str) -> list[int]:
        """The tokens of an answer with what the template writes behind it; by whoever asks in the answers' order."""
        for n, (said, ids) in enumerate(self._left):
            if said and text.startswith(said):
                del self._left[: n + 1]
                rest = text[len(said) :]
                return [*ids, *(self._tokenizer.encode(rest) if rest else ())]
        return self._tokenizer.encode(text)


def guard(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[Piece]:
    """Pieces in which what somebody wrote cannot become a special token, alone or joined with its neighbours' text."""
    texts = ["", *(p.text for p in pieces), ""]
    found = []
    for n, piece in enumerate(pieces):
        before, after = texts[n], texts[n + 2]
        end = len(before) + len(piece.text)
        steers = piece.authored and tokenizer.controls(before + piece.text + after, len(before), end)
        found.append(replace(piece, special=False) if steers else piece)
    return found


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """`messages` with a system turn if they have none, are no running text, and there is something to say."""
    has = bool(messages) and messages[0].role in ("system", "text")
    return list(messages) if has or not system else [Message("system", system), *messages]


def text_pieces(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Piece] | None:
    """The pieces of a running text, which no template frames; None of a conversation."""
    if not messages or messages[0].role != "text":
        return None
    found = [Piece(tokenizer.opening, False, True)] if tokenizer.opening else []
    for message in messages:
        parts = _split(message.content, message.marks)
        run = [Piece(text, message.trained, True, authored=not mark) for text, mark in parts]
        found += [replace(run[0], begins=True), *run[1:]] if run else []
        if message.ends:
            found.append(Piece(tokenizer.eos_token, message.trained, True, begins=True))
    return guard(found, tokenizer)


def image_pieces(piece: Piece) -> list[Piece]:
    """An authored piece cut at its <image> marks."""
    marked = [replace(piece, text=text, image=mark) for text, mark in _split(piece.text, (IMAGE,))]
    return [replace(p, begins=p.begins and n == 0, authored=not p.image) for n, p in enumerate(marked)]


def _split(text: str, marks: Sequence[str]) -> list[tuple[str, bool]]:
    """`text` cut at every mark: (part, whether it is a mark); empty parts are left out."""
    if not marks:
        return [(text, False)] if text else []
    parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", text)
    return [(part, n % 2 == 1) for n, part in enumerate(parts) if part]


class _Named:
    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self._row = TEMPLATES[name]
        self.stop = self._row.stop
        self._tokenizer = tokenizer
        self._bos = tokenizer.opening
        self._eos = tokenizer.eos_token if self._row.eos or not self._row.suffix else ""

    def pieces(self, conversation: Conversation, system: str = "") -> list[Piece]:
        return self._cut(conversation.messages, system, conversation.tools, bool(conversation.images))

    def prompt(
        self, messages: Sequence[Message], system: str = "", tools: Sequence[Tool] = (), images: bool = False
    ) -> list[Piece]:
        return self._cut(messages, system, tools, images)

    def _cut(self, messages: Sequence[Message], system: str, tools: Sequence[Tool], images: bool) -> list[Piece]:
        if (text := text_pieces(messages, self._tokenizer)) is not None:
            return text
        if tools or any(m.calls or m.role == "tool" for m in messages):
            raise InvalidArgument(
                f"the template {self.name} has no place for tools; use the model's own, named tokenizer",
                reason="TOOLS_UNSUPPORTED",
            )
        found: list[Piece] = []
        turn, begin, joined = 0, True, False
        for message in with_system(messages, system):
            if begin and self._bos:
                found.append(Piece(self._bos, False, True, begins=True))
            if message.role == "assistant":
                found += self._answer(message)
            else:
                turn += message.role == "user"
                run = self._question(message, turn, images)
                # A system text is tokenised together with the question behind it.
                found += run if joined or not run else [replace(run[0], begins=True), *run[1:]]
                joined = message.role == "system" and bool(run or joined)
            # After a real EOS the next turn begins a text again.
            begin = message.role == "assistant" and bool(self._eos)
        return guard(found, self._tokenizer)

    def _question(self, message: Message, turn: int, images: bool) -> list[Piece]:
        if message.role == "user":
            return self._fill(self._row.instruction.replace("{round}", str(turn)), "{input}", message.content, images)
        if not message.content:
            return []
        if not self._row.system:
            raise InvalidArgument(
                f"the template {self.name} has no place for a system text; leave it out or use another template",
                reason="TEMPLATE_REFUSED",
            )
        return self._fill(self._row.system, "{system}", message.content, False)

    def _answer(self, message: Message) -> list[Piece]:
        """What is joined is tokenised as XTuner does: the text with its suffix, then each part on its own."""
        trained, row = message.trained, self._row
        found = [Piece(message.content, trained, True, authored=True, begins=True)]
        if row.suffix:
            found.append(Piece(row.suffix, trained, True))
        if self._eos:
            found.append(Piece(self._eos, trained, True, begins=True))
        if row.sep:
            found.append(Piece(row.sep, False, True, begins=True))
        return found

    def _fill(self, form: str, slot: str, text: str, images: bool) -> list[Piece]:
        before, _, after = form.partition(slot)
        written = Piece(text, False, True, authored=True)
        inner = image_pieces(written) if images else [written]
        return [p for p in (Piece(before, False, True), *inner, Piece(after, False, True)) if p.text]

    def jinja(self) -> str:
        row = self._row
        bos = "{{ bos_token }}" if self._bos else ""
        end = " + ".join([*([_quote(row.suffix)] if row.suffix else []), *(["eos_token"] if self._eos else [])])
        again = bos if self._eos else ""
        refused = "{{{{ raise_exception('the template {} has no place for {}') }}}}"

        def filled(form: str, slot: str) -> str:
            before, _, after = form.partition(slot)
            before = "{{ " + _quote(before) + " }}" if "{round}" not in before else _round(before)
            return f"{before}{{{{ message['content'] }}}}{{{{ {_quote(after)} }}}}"

        system = filled(row.system, "{system}") if row.system else refused.format(self.name, "a system text")
        return (
            f"{{% if tools %}}{refused.format(self.name, 'tools')}{{% endif %}}"
            f"{bos}{{% set ns = namespace(turn=0) %}}{{% for message in messages %}}"
            f"{{% if message['role'] == 'system' %}}"
            f"{{% if message['content'] %}}{system}{{% endif %}}"
            f"{{% elif message['role'] == 'user' %}}{{% set ns.turn = ns.turn + 1 %}}{filled(row.instruction, '{input}')}"
            f"{{% elif message['role'] == 'assistant' and not message['tool_calls'] %}}"
            f"{{{{ message['content'] + {end} + {_quote(row.sep)} }}}}"
            f"{{% if not loop.last %}}{again}{{% endif %}}"
            f"{{% else %}}{refused.format(self.name, 'tools')}{{% endif %}}{{% endfor %}}"
        )


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _round(text: str) -> str:
    before, _, after = text.partition("{round}")
    return f"{{{{ {_quote(before)} }}}}{{{{ ns.turn }}}}{{{{ {_quote(after)} }}}}"


def example(name: str) -> str:
    """One turn in a named template, for lists."""
    row = TEMPLATES[name]
    return row.instruction.replace("{input}", "Hello").replace("{round}", "1") + "Hi." + row.suffix
