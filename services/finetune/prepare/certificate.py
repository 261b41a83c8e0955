"""The parity certificate: what a template and a tokenizer make of a fixed set of conversations.

It is made where data is prepared, and goes along from there: prepared data -> checkpoint -> adapter -> merged model.
Whoever answers with such a model makes its own and compares: ids that training never saw are refused, not answered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import groupby
from typing import Any

from services.finetune import chat_template
from services.finetune.errors import FailedPrecondition, QuartetError
from services.finetune.formats import Conversation, Message
from services.finetune.templates import Piece, Template, encode
from services.finetune.tokenizer import Tokenizer

META = "certificate"
"""Its key in a manifest's meta."""

Certificate = Mapping[str, Any]
"""Plain JSON: {"digest", "tokenizer": sha256 of tokenizer.json, "template": {"name", "digest"},
"probes": [{"name", "digest", "ids", "tokens"} or {"name", "refused": true}]}."""

_DAY = datetime(2024, 7, 1)


def _turns(*texts: str, system: str = "") -> tuple[Message, ...]:
    said = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    return (Message("system", system), *said) if system else tuple(said)


PROBES: Mapping[str, tuple[Message, ...]] = {
    "en": _turns("Who are you?", "I'm an assistant, at your service."),
    "zh-system": _turns("请介绍一下你自己。", "我是一个助手。", system="你是一个有用的助手。"),
    "turns": _turns("2+2=?", "4", "And 10 × 1,000?", "10,000\n", system="Be brief."),
    "special-text": _turns("Say <|im_end|> and </s>, [INST] too.\n<|im_start|>system", "<s> no </s>"),
    "spaces": _turns("  def f(x):\n\treturn x  ", "```python\nf( 1 )\n```  "),
    "prompt": _turns("naïve café 😀?", "Oui.", "再来一次！"),
}
"""Fixed for good: a certificate made today is compared for as long as its model is served. The last one is answered."""


def certify(tokenizer: Tokenizer, template: Template) -> Certificate:
    """The certificate of a tokenizer and a template."""
    with _pinned_clock():
        shown = {name: _pieces(template, messages) for name, messages in PROBES.items()}
        probes = [_probe(name, pieces, tokenizer) for name, pieces in shown.items()]
    body = {
        "tokenizer": tokenizer.digest,
        "template": {"name": template.name, "digest": _template_digest(template, shown)},
        "probes": probes,
    }
    return {**body, "digest": _digest(body)}


def carried(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What goes along of a manifest's meta to what is made from it."""
    return {META: meta[META]} if META in meta else {}


def check(trained: Certificate, own: Certificate, what: str) -> None:
    """FailedPrecondition (PARITY_MISMATCH) unless `own`, made by whoever answers, equals `trained`, which `what` carries.

    It names the first probe and index where the token ids differ, and both tokens.
    """
    if trained["digest"] == own["digest"]:
        return
    metadata = {
        "trained_template": trained["template"]["name"],
        "trained_tokenizer": trained["tokenizer"],
        "own_template": own["template"]["name"],
        "own_tokenizer": own["tokenizer"],
    }
    theirs, ours = ({p["name"]: p for p in c["probes"]} for c in (trained, own))
    why = "the digests differ, though the token ids of all probes agree"
    for name, probe in theirs.items():
        found = _first_difference(probe, ours.get(name, {"refused": True}))
        if found is not None:
            index, then, now = found
            metadata |= {"probe": name, "index": str(index), "trained_token": then, "own_token": now}
            why = f"probe {name!r} differs first at index {index}: trained on {then}, here it is {now}"
            break
    raise FailedPrecondition(
        f"{what} was trained on other token ids than this tokenizer and template make: {why}; serve it with the "
        "tokenizer files and the template that it was trained with, or train again",
        reason="PARITY_MISMATCH",
        metadata=metadata,
    )


def _first_difference(trained: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[int, str, str] | None:
    """(index, the trained token, our token) where two probes differ first."""
    if trained.get("digest") == own.get("digest"):
        return None
    ids, others = trained.get("ids", []), own.get("ids", [])
    both = min(len(ids), len(others))
    index = next((n for n in range(both) if ids[n] != others[n]), both)
    return index, _token(trained, index), _token(own, index)


def _token(probe: Mapping[str, Any], index: int) -> str:
    if "ids" not in probe:
        return "nothing, as the template refuses the conversation"
    if index >= len(probe["ids"]):
        return "the end"
    return f"{probe['ids'][index]} {probe['tokens'][index]!r}"


def _pieces(template: Template, messages: Sequence[Message]) -> list[Piece] | None:
    """A probe in a template, None if the template refuses it: some take no system text."""
    try:
        if messages[-1].role == "user":
            return template.prompt(messages)
        return template.pieces(Conversation(tuple(messages)))
    except QuartetError:
        return None


def _probe(name: str, pieces: list[Piece] | None, tokenizer: Tokenizer) -> dict[str, Any]:
    if pieces is None:
        return {"name": name, "refused": True}
    ids = encode(pieces, tokenizer).ids
    tokens = [tokenizer.backend.id_to_token(i) or "" for i in ids]
    return {"name": name, "digest": _digest(ids), "ids": ids, "tokens": tokens}


def _template_digest(template: Template, shown: Mapping[str, list[Piece] | None]) -> str:
    """What the template writes and where it stops; of a model's own also its source, which probes may not exhaust."""
    said = {
        name: None if pieces is None else [["".join(p.text for p in run), t] for t, run in _runs(pieces)]
        for name, pieces in shown.items()
    }
    source = template.jinja() if template.name == "tokenizer" else ""
    return _digest({"name": template.name, "source": source, "stop": list(template.stop), "said": said})


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[bool, Iterator[Piece]]]:
    return groupby(pieces, key=lambda p: p.trained)


def _digest(value: object) -> str:
    data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return "sha256:" + hashlib.sha256(data).hexdigest()


@contextmanager
def _pinned_clock() -> Iterator[None]:
    token = chat_template.CLOCK.set(_DAY)
    try:
        yield
    finally:
        chat_template.CLOCK.reset(token)
