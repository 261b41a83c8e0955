"""Formats, templates and packing: rows to blocks of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.finetune.errors import InvalidArgument, NotFound
from services.finetune.formats import Conversation, Message, Problem, Row, read_rows, sniff
from services.finetune.packing import IGNORED, order, pack
from services.finetune.recipes import names, resolve
from services.finetune.templates import TEMPLATES, Encoded, encode, load_template, to_prompt_ids
from services.finetune.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}

GOOD = [
    ("openai", {"messages": [{"role": "system", "content": "s"}, ASK, SAY]}, ["system", "user", "assistant"]),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        ["user", "assistant"],
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, ["user", "assistant"]),
    ("default", {"conversation": [{"system": "s", "input": "q", "output": "a"}]}, ["system", "user", "assistant"]),
]

BAD = [
    ({"messages": [ASK, {"role": "assistant"}]}, "messages[1].content", "FIELD_MISSING"),
    ({"messages": [ASK, {"role": "assistant", "content": " "}]}, "messages[1].content", "ANSWER_EMPTY"),
    ({"messages": [ASK, {"role": "robot", "content": "x"}]}, "messages[1].role", "ROLE_UNKNOWN"),
    ({"messages": [SAY]}, "messages[0].content", "TURN_ORDER"),
    ({"messages": [SAY, ASK]}, "messages[1].content", "ANSWER_MISSING"),
    ({"messages": [ASK, SAY, SAY]}, "messages[2].content", "TURN_ORDER"),
    ({"messages": [ASK]}, "messages[0].content", "ANSWER_MISSING"),
    ({"messages": "hello"}, "messages", "FIELD_TYPE"),
    ({"messages": [ASK, {"role": "assistant", "content": 7}]}, "messages[1].content", "FIELD_TYPE"),
    ({}, "messages", "FIELD_MISSING"),
]

BROKEN = [
    (b'{"messages": [', "JSON_INVALID"),
    (b'{"messages": "\xe9"}', "ENCODING_INVALID"),
    (b'{"messages": NaN}', "JSON_INVALID"),
    (b'{"a": 1, "a": 2}', "JSON_INVALID"),
    (b"[1, 2]", "ROW_NOT_OBJECT"),
    (b'{"messages": ' + b"[" * 200_000, "JSON_TOO_DEEP"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_files(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(("format", "row", "roles"), GOOD)
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_good_rows_of_every_container(
    tmp_path: Path, format: str, row: dict[str, object], roles: list[str], ending: str
) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        path.write_text("\ufeff" + json.dumps(row) + "\n\n" + json.dumps(row))
    elif ending == "json":
        path.write_text(json.dumps([row, row]))
    elif ending == "csv":
        import csv

        with path.open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(row)
            for _ in range(2):
                writer.writerow([v if isinstance(v, str) else json.dumps(v) for v in row.values()])
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    files = [(path.name, path)]
    assert sniff(files)[0] == format
    rows = list(read_rows(files, format))
    assert [[m.role for m in r.conversation.messages] for r in rows if isinstance(r, Row)] == [roles, roles]


@pytest.mark.parametrize(("row", "field", "reason"), BAD)
def test_bad_rows_are_blamed_by_field(tmp_path: Path, row: object, field: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [ASK, SAY]}) + "\n" + json.dumps(row))
    good, bad = read_rows([("a.jsonl", path)], "openai")
    assert isinstance(good, Row) and isinstance(bad, Problem)
    assert (bad.file, bad.row, bad.field, bad.reason) == ("a.jsonl", 2, field, reason)


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_broken_lines_do_not_hide_the_next(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n" + json.dumps({"messages": [ASK, SAY]}).encode())
    bad, good = read_rows([("a.jsonl", path)], "openai")
    assert isinstance(bad, Problem) and (bad.row, bad.reason) == (1, reason)
    assert isinstance(good, Row) and good.row == 2


def test_unknown_rows_name_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"foo": 1}')
    with pytest.raises(InvalidArgument, match=r"foo.*openai"):
        sniff([("a.jsonl", path)])


texts = st.text(min_size=1, max_size=30).filter(lambda t: bool(t.strip()))


@pytest.mark.parametrize("name", ["tokenizer", *TEMPLATES])
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), system=st.sampled_from(["", "be kind"]))
def test_a_prompt_is_a_prefix_of_its_conversation(
    name: str, tokenizer: Tokenizer, turns: list[tuple[str, str]], system: str
) -> None:
    template = load_template(name, tokenizer)
    system = system if name == "tokenizer" or TEMPLATES[name].system else ""
    messages = [m for q, a in turns for m in (Message("user", q), Message("assistant", a))]
    whole = encode(template.pieces(Conversation(tuple(messages)), system), tokenizer)
    prompt = to_prompt_ids(template, tokenizer, messages[:-1], system)
    assert whole.ids[: len(prompt)] == prompt
    learned = [i for i, m in zip(whole.ids[len(prompt) :], whole.mask[len(prompt) :], strict=True) if m]
    assert tokenizer.decode(learned).startswith(turns[-1][1])
    assert not any(whole.mask[: len(prompt)]) or len(turns) > 1


def test_own_template_gives_what_transformers_gives(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "t"))
    messages = [Message("system", "s"), Message("user", "你好 there"), Message("assistant", "a"), Message("user", "b")]
    plain = [{"role": m.role, "content": m.content} for m in messages]
    wanted = theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert to_prompt_ids(load_template("", tokenizer), tokenizer, messages) == list(wanted)


parts = st.sampled_from(["<|im_", "start|>", "<|im_end|>", "end|>", "<|endoftext|>", "<|", "|>", "hi ", "\n", "你"])
evils = st.lists(parts, min_size=1, max_size=6).map("".join)


@pytest.mark.parametrize("name", ["tokenizer", *TEMPLATES])
@given(evil=evils, again=evils)
def test_special_tokens_in_what_people_write_stay_text(name: str, tokenizer: Tokenizer, evil: str, again: str) -> None:
    template = load_template(name, tokenizer)

    def controls(question: str, answer: str) -> list[int]:
        talk = Conversation((Message("user", question), Message("assistant", answer)))
        ids = encode(template.pieces(talk), tokenizer).ids
        assert question.strip() in (text := tokenizer.decode(ids, skip_special=False)) and answer.strip() in text
        return [i for i in ids if i < 3]

    assert controls(evil, again) == controls("hi", "no")


def test_named_templates_as_jinja_say_the_same(tokenizer: Tokenizer) -> None:
    whole = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"), Message("user", "r"))
    for name, row in TEMPLATES.items():
        messages = whole if row.system else whole[1:]
        template = load_template(name, tokenizer)
        own = Tokenizer.__new__(Tokenizer)
        own.__dict__.update(tokenizer.__dict__, chat_template=template.jinja())
        text = "".join(p.text for p in template.prompt(messages))
        assert "".join(p.text for p in load_template("tokenizer", own).prompt(messages)) == text, name


samples = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(lengths=samples, room=st.integers(8, 32))
def test_packing_loses_and_mixes_nothing(lengths: list[int], room: int) -> None:
    encoded = [
        Encoded([1000 * n + k for k in range(size)], [k > 0 for k in range(size)]) for n, size in enumerate(lengths)
    ]
    blocks = pack(encoded, room, True)
    found = []
    for block in range(len(blocks)):
        for segment in range(1, blocks.segments[block].max() + 1):
            here = blocks.segments[block] == segment
            ids = blocks.ids[block][here].tolist()
            assert blocks.positions[block][here].tolist() == list(range(len(ids)))
            assert blocks.labels[block][here].tolist() == [IGNORED, *ids[1:]]
            found.append(ids)
    assert sorted(found) == sorted(e.ids[:room] for e in encoded if len(e.ids[:room]) > 1)
    assert blocks.truncated == sum(size > room for size in lengths)


@given(n=st.integers(1, 50), epoch=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_order_is_a_permutation_that_repeats(n: int, epoch: int, seed: int) -> None:
    first = order(n, epoch, seed).tolist()
    assert sorted(first) == list(range(n)) and first == order(n, epoch, seed).tolist()


def test_every_recipe_on_offer_resolves() -> None:
    for name in names():
        assert resolve(name).since and resolve(name).name == name
    seed = resolve("internlm_chat_7b_qlora_oasst1_e3")
    assert (seed.checkpoint, seed.config.lora.rank, seed.config.optim.lr) == ("internlm/internlm-chat-7b", 64, 2e-4)
    assert (seed.config.data.template, seed.config.schedule.epochs) == ("internlm_chat", 3)
    assert not resolve("zephyr_7b_beta_lora_alpaca_e2").since
    with pytest.raises(NotFound, match="did you mean 'internlm_chat_7b_qlora_oasst1_e3'"):
        resolve("internlm_chat_7b_qlora_oast1_e3")
