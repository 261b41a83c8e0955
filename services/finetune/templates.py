"""Conversations to pieces of text with a loss flag, pieces to token ids and labels.

Two kinds of template stand behind one class: the model's own chat template (Jinja, sandboxed), and the named ones of
XTuner 0.2.0's table, as data. The ids of a prompt are always an exact prefix of the ids of the same conversation with
its answer, because both are cut into the same pieces. Only an assistant's text and its end-of-turn token are learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from services.finetune.errors import FailedPrecondition, InvalidArgument, nearest
from services.finetune.formats import Conversation, Message
from services.finetune.tokenizer import Tokenizer


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


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and for each whether it is learned."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True, slots=True)
class Row:
    """A named template: {system}, {input} and {round} are filled in.

    `suffix` ends an answer and is learned; without one the tokenizer's EOS does. `sep` follows, not learned.
    """

    system: str
    instruction: str
    suffix: str = ""
    sep: str = "\n"
    stop: tuple[str, ...] = ()


_CHATML = Row(
    "<|im_start|>system\n{system}<|im_end|>\n",
    "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>",
    stop=("<|im_end|>",),
)
_LLAMA2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n"
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. {system}\n "
)

TEMPLATES: Mapping[str, Row] = {
    "default": Row("<|System|>:{system}\n", "<|User|>:{input}\n<|Bot|>:"),
    "chatml": _CHATML,
    "internlm_chat": Row("<|System|>:{system}\n", "<|User|>:{input}<eoh>\n<|Bot|>:", "<eoa>", stop=("<eoa>",)),
    "internlm2_chat": _CHATML,
    "qwen_chat": Row(_CHATML.system, _CHATML.instruction, _CHATML.suffix, stop=("<|im_end|>", "<|endoftext|>")),
    "llama2_chat": Row(f"[INST] <<SYS>>\n {_LLAMA2_SYSTEM}{{system}}\n<</SYS>>\n [/INST] ", "[INST] {input} [/INST]"),
    "mistral": Row("[INST] {system} [/INST]\n", "[INST] {input} [/INST]"),
    "zephyr": Row("<|system|>\n{system}\n", "<|user|>\n{input}\n<|assistant|>\n"),
    "vicuna": Row(_VICUNA, "USER: {input} ASSISTANT:"),
    "llama3_chat": Row(
        "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{input}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        sep="",
        stop=("<|eot_id|>",),
    ),
}


class Template(Protocol):
    """What training, preview and chat need of a template."""

    name: str
    stop: tuple[str, ...]

    def pieces(self, conversation: Conversation, system: str = "") -> list[Piece]:
        """A whole conversation. `system` is used when it has no system turn of its own."""

    def prompt(self, messages: Sequence[Message], system: str = "") -> list[Piece]:
        """A conversation that ends with a user's turn, up to where the answer begins."""

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


def encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Encoded:
    """Token ids and loss mask."""
    ids: list[int] = []
    mask: list[bool] = []
    for text, trained, special in runs(pieces):
        new = tokenizer.encode(text) if special else tokenizer.encode_plain(text)
        ids += new
        mask += [trained] * len(new)
    return Encoded(ids, mask)


def runs(pieces: Sequence[Piece]) -> list[tuple[str, bool, bool]]:
    """(text, trained, special) of each text that is tokenised by itself: neighbours of one kind go together."""
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


def to_prompt_ids(template: Template, tokenizer: Tokenizer, messages: Sequence[Message], system: str = "") -> list[int]:
    """What to feed for an answer to `messages`."""
    return encode(template.prompt(messages, system), tokenizer).ids


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
    """`messages` with a system turn if they have none and there is something to say."""
    has = bool(messages) and messages[0].role == "system"
    return list(messages) if has or not system else [Message("system", system), *messages]


class _Named:
    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self._row = TEMPLATES[name]
        self.stop = self._row.stop
        self._tokenizer = tokenizer
        self._bos = tokenizer.bos_token if tokenizer.adds_bos else ""

    def pieces(self, conversation: Conversation, system: str = "") -> list[Piece]:
        return self._cut(conversation.messages, system)

    def prompt(self, messages: Sequence[Message], system: str = "") -> list[Piece]:
        return self._cut(messages, system)

    def _cut(self, messages: Sequence[Message], system: str) -> list[Piece]:
        row, found, turn = self._row, [], 0
        begin = True
        for message in with_system(messages, system):
            if begin and self._bos:
                found.append(Piece(self._bos, False, True))
            begin = False
            if message.role == "system":
                if message.content:
                    found += self._fill(row.system, "{system}", message.content)
            elif message.role == "user":
                turn += 1
                found += self._fill(row.instruction.replace("{round}", str(turn)), "{input}", message.content)
            else:
                trained = message.trained
                found.append(Piece(message.content, trained, True, authored=True, begins=True))
                found.append(Piece(row.suffix or self._tokenizer.eos_token, trained, True))
                if row.sep:
                    found.append(Piece(row.sep, False, True, begins=True))
                begin = not row.suffix  # after a real EOS the next turn begins a text again
        return guard(found, self._tokenizer)

    def _fill(self, form: str, slot: str, text: str) -> list[Piece]:
        before, _, after = form.partition(slot)
        return [Piece(before, False, True), Piece(text, False, True, authored=True), Piece(after, False, True)]

    def jinja(self) -> str:
        row = self._row
        bos = "{{ bos_token }}" if self._bos else ""
        again = bos if not row.suffix else ""
        end = _quote(row.suffix) if row.suffix else "eos_token"

        def filled(form: str, slot: str) -> str:
            before, _, after = form.partition(slot)
            before = "{{ " + _quote(before) + " }}" if "{round}" not in before else _round(before)
            return f"{before}{{{{ message['content'] }}}}{{{{ {_quote(after)} }}}}"

        return (
            f"{bos}{{% set ns = namespace(turn=0) %}}{{% for message in messages %}}"
            f"{{% if message['role'] == 'system' %}}"
            f"{{% if message['content'] %}}{filled(row.system, '{system}')}{{% endif %}}"
            f"{{% elif message['role'] == 'user' %}}{{% set ns.turn = ns.turn + 1 %}}{filled(row.instruction, '{input}')}"
            f"{{% else %}}{{{{ message['content'] + {end} + {_quote(row.sep)} }}}}"
            f"{{% if not loop.last %}}{again}{{% endif %}}{{% endif %}}{{% endfor %}}"
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
