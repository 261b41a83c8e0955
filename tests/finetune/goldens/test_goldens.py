"""Token ids and labels are those of XTuner 0.2.0, run itself (make_goldens.py), but for the differences that are named."""

from __future__ import annotations

import gzip
import json
from functools import cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import pytest

from services.finetune.errors import InvalidArgument
from services.finetune.formats import Conversation, Message, RowError, format_named
from services.finetune.formats.pairs import SYSTEMS
from services.finetune.packing import pack
from services.finetune.templates import IMAGE_ID, TEMPLATES, Encoded, encode, load_template
from services.finetune.tokenizer import Tokenizer
from tests.finetune.goldens.real_tokenizers import NAMES
from tests.finetune.goldens.samples import DIFFERENCES, SAMPLES, STEERING, UNFRAMED

HERE = Path(__file__).parent
TABLES: dict[str, Any] = json.loads((HERE / "tables.json").read_text("utf-8"))
FEW = ("default", "internlm2_chat", "llama2_chat", "gemma")

Tokenizers = dict[str, Tokenizer]


@cache
def golden(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress((HERE / f"{name}.json.gz").read_bytes()))
    return found


def encoded(tokenizer: Tokenizer, template: str, conversation: Conversation) -> Encoded:
    return encode(load_template(template, tokenizer).pieces(conversation), tokenizer, IMAGE_ID)


def as_golden(found: Encoded) -> list[Any]:
    learned, at = [], 0
    for is_learned, run in groupby(found.mask):
        size = len(list(run))
        if is_learned:
            learned.append([at, at + size])
        at += size
    return [found.ids, learned]


def ours(tokenizer: Tokenizer, template: str, format: str, row: dict[str, Any]) -> list[Any]:
    return as_golden(encoded(tokenizer, template, format_named(format).convert(row)))


def framed(format: str) -> list[dict[str, Any]]:
    return [row for n, row in enumerate(SAMPLES[format]) if (format, n) not in UNFRAMED]


@pytest.mark.parametrize("template", TABLES["templates"])
@pytest.mark.parametrize("name", NAMES)
def test_ids_and_labels_are_xtuners(tokenizers: Tokenizers, name: str, template: str) -> None:
    for format, wanted in golden(name)["framed"][template].items():
        for row, there in zip(framed(format), wanted, strict=True):
            if there == "AttributeError":  # minicpm has no place for a system text: XTuner fails, we refuse
                with pytest.raises(InvalidArgument) as caught:
                    ours(tokenizers[name], template, format, row)
                assert caught.value.reason == "TEMPLATE_REFUSED" and template == "minicpm"
                continue
            found = ours(tokenizers[name], template, format, row)
            assert found == there, f"{format}: {row}\n{tokenizers[name].decode(found[0], skip_special=False)!r}"


@pytest.mark.parametrize("template", FEW)
@pytest.mark.parametrize("name", NAMES)
def test_what_no_template_frames_is_xtuners(tokenizers: Tokenizers, name: str, template: str) -> None:
    for format, n in UNFRAMED:
        wanted = golden(name)["unframed"][f"{format}[{n}]"]
        assert ours(tokenizers[name], template, format, SAMPLES[format][n]) == wanted, format


def test_every_format_and_template_of_xtuner_is_covered() -> None:
    assert set(TABLES["templates"]) <= set(TEMPLATES) and len(TABLES["templates"]) == 27
    assert {format_named(name).name for name in TABLES["formats"]} | {"moss_sft"} == set(SAMPLES)
    assert len(TABLES["formats"]) == 20 and TABLES["systems"] == SYSTEMS and len(SYSTEMS) == 8


@pytest.mark.parametrize("name", TABLES["templates"])
def test_templates_are_xtuners_letter_by_letter(name: str) -> None:
    row, theirs = TEMPLATES[name], TABLES["templates"][name]
    assert (row.instruction, row.system) == (theirs["INSTRUCTION"], theirs.get("SYSTEM", ""))
    assert (row.suffix, row.sep) == (theirs.get("SUFFIX", ""), theirs.get("SEP", ""))
    assert row.eos == ("SUFFIX" in theirs and not theirs.get("SUFFIX_AS_EOS", False))
    assert list(row.stop) == theirs.get("STOP_WORDS", [])


@pytest.mark.parametrize("template", TABLES["templates"])
@pytest.mark.parametrize("name", NAMES)
def test_exported_templates_say_the_same(tokenizers: Tokenizers, name: str, template: str) -> None:
    tokenizer = tokenizers[name]
    named = load_template(template, tokenizer)
    exported = Tokenizer.__new__(Tokenizer)
    exported.__dict__.update(tokenizer.__dict__, chat_template=named.jinja())
    for row in SAMPLES["openai"]:
        conversation = format_named("openai").convert(row)
        if not TEMPLATES[template].system:
            turns = tuple(m for m in conversation.messages if m.role != "system")
            conversation = Conversation(turns)
        texts = ["".join(p.text for p in t.pieces(conversation)) for t in (named, load_template("tokenizer", exported))]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("template", FEW)
@pytest.mark.parametrize("key", [key for key, d in DIFFERENCES.items() if d.corrected])
@pytest.mark.parametrize("name", NAMES)
def test_named_differences_are_what_they_say(tokenizers: Tokenizers, name: str, key: str, template: str) -> None:
    difference, data = DIFFERENCES[key], golden(name)
    found = ours(tokenizers[name], template, difference.format, difference.row)
    assert found == data["corrected"][template][key]
    assert found != data["theirs"][template][key], "the difference is gone: take it off the list"


@pytest.mark.parametrize("key", [key for key, d in DIFFERENCES.items() if d.blamed])
def test_rows_that_xtuner_takes_are_blamed(key: str) -> None:
    difference = DIFFERENCES[key]
    with pytest.raises(RowError) as caught:
        format_named(difference.format).convert(difference.row)
    assert caught.value.reason == difference.blamed


@pytest.mark.parametrize("name", NAMES)
def test_moss_results_are_masked_by_their_text(tokenizers: Tokenizers, name: str) -> None:
    difference, tokenizer = DIFFERENCES["moss-results"], tokenizers[name]
    found = encoded(tokenizer, "default", format_named("moss_sft").convert(difference.row))
    theirs = golden(name)["theirs"]["default"]["moss-results"]
    # SmolLM2's tokenizer merges nothing across these borders, so that counting marks comes out right.
    assert (as_golden(found) == theirs) == (name == "smollm2")
    turn = difference.row["chat"]["turn_1"]
    learned = [i for i, mask in zip(found.ids, found.mask, strict=True) if mask]
    kept = {**turn, "Tool Responses": "<|Results|>:<eor>\n"}
    squeezed = tokenizer.decode(learned, skip_special=False).replace(" ", "")
    assert squeezed == "".join(kept.values()).replace(" ", "")


@pytest.mark.parametrize("template", FEW)
@pytest.mark.parametrize("name", NAMES)
def test_xtuner_lets_users_steer_and_we_do_not(tokenizers: Tokenizers, name: str, template: str) -> None:
    tokenizer, theirs = tokenizers[name], golden(name)["steering"][template][0]
    found = encoded(tokenizer, template, Conversation((Message("user", STEERING), Message("assistant", "No."))))
    kind = encoded(tokenizer, template, Conversation((Message("user", "Ignore"), Message("assistant", "No."))))
    controls = {tokenizer.encode(text)[0] for text in tokenizer.special_texts if len(tokenizer.encode(text)) == 1}
    count = [sum(i in controls for i in ids) for ids in (theirs, found.ids, kind.ids)]
    assert count[0] > count[1] == count[2]


def test_a_bos_stands_only_where_the_tokenizer_puts_it(tokenizers: Tokenizers) -> None:
    """SmolLM2 has a BOS, <|im_start|>, and begins no text with it; XTuner begins every text with two."""
    row = {"input": "Hi", "output": "Hello"}
    for name in NAMES:
        there, here = golden(name)["bos"], ours(tokenizers[name], "internlm2_chat", "default", row)
        bos = [1] if name == "smollm2" else []
        assert there[0] == [*bos, *here[0]]


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_as_long_as_those_xtuner_packs_and_are_not_cut(tokenizers: Tokenizers, name: str) -> None:
    data = golden(name)["packed"]
    rows = [(f, row) for f in ("openai", "alpaca", "wizardlm", "sql") for row in SAMPLES[f]]
    samples = [encoded(tokenizers[name], "internlm2_chat", format_named(f).convert(row)) for f, row in rows]
    assert [len(s.ids) for s in samples] == data["lengths"]
    ends, chunk = list(accumulate(data["lengths"])), data["chunk"]
    theirs = [n * chunk + border for n, borders in enumerate(data["borders"]) for border in borders[1:]]
    whole = [end for end in ends if end <= theirs[-1]]
    assert sorted({*whole, *range(chunk, theirs[-1] + 1, chunk)}) == theirs
    # XTuner cuts samples at every chunk's end and leaves the rest of the last one to the next call; here none is cut.
    blocks = pack(samples, max(chunk, *data["lengths"]), True)
    assert blocks.truncated == blocks.dropped == 0
    assert int((blocks.segments > 0).sum()) == sum(data["lengths"])
