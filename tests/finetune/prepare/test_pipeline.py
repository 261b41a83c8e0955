"""Rows to blocks: the same tokens as one conversation at a time, whatever the number of processes."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.finetune.config import DataConfig
from services.finetune.errors import InvalidArgument
from services.finetune.formats import Conversation, Message, Problem, Row, read_rows
from services.finetune.packing import Blocks, Flat
from services.finetune.prepare import shards
from services.finetune.prepare.jinja import only_writes
from services.finetune.prepare.pipeline import build
from services.finetune.prepare.rendering import Renderer
from services.finetune.prepare.shards import Source
from services.finetune.templates import Encoded, encode, load_template, runs
from services.finetune.tokenizer import FASTOKENS, HUGGING_FACE, Tokenizer
from tests.tiny import CHATML, tiny_tokenizer

TRIM = CHATML.replace("message['content']", "(message['content'] | trim)")
THINK = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
SHOUT = CHATML.replace("message['content']", "(message['content'] | upper)")
WORDS = ("hello", "你好", " spaced ", "<|im_end|>", "12 ½", "\n", "a</think>b", "<", "end|>", "long " * 30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("model"))


def with_template(model: Path, directory: Path, template: str) -> Tokenizer:
    directory.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((model / file).read_bytes())
    (directory / "chat_template.jinja").write_text(template)
    return Tokenizer.from_files(directory)


def rows_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of all lengths; some bad, some with special tokens' texts, some too long."""
    draw = random.Random(seed)
    made: list[dict[str, Any]] = []
    for n in range(count):
        turns = [
            {"role": role, "content": f"{n} " + "".join(draw.choices(WORDS, k=draw.randint(1, 9)))}
            for _ in range(draw.randint(1, 3))
            for role in ("user", "assistant")
        ]
        made.append({"messages": turns if draw.random() > 0.05 else "bad"})
    return made


def source(folder: Path, rows: Sequence[object], name: str = "a.jsonl", weight: float = 1.0) -> Source:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    else:
        path.write_text(json.dumps(list(rows)), "utf-8")
    return Source(name=name, files=((name, path),), format="openai", weight=weight)


def one_by_one(sources: Sequence[Source], name: str, model: Path, data: DataConfig) -> list[Encoded]:
    """What preview, training and chat say of each row."""
    tokenizer = Tokenizer.from_files(model)
    template = load_template(name, tokenizer)
    rows = [row for s in sources for row in read_rows(s.files, s.format) if isinstance(row, Row)]
    found = [encode(template.pieces(row.conversation, data.system), tokenizer) for row in rows]
    cut = [Encoded(e.ids[: data.max_length], [False, *e.mask[1 : data.max_length]]) for e in found]
    return [e for e in cut if any(e.mask)]


def samples_of(flat: Flat) -> list[Encoded]:
    taken = (flat.sample(n) for n in range(len(flat.offsets) - 1))
    return [Encoded(ids.tolist(), mask.tolist()) for ids, mask in taken]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(("template", "max_length"), [("", 300), ("chatml", 300), ("llama2_chat", 800)])
def test_blocks_hold_what_each_row_is_by_itself(model: Path, tmp_path: Path, template: str, max_length: int) -> None:
    sources = [source(tmp_path, rows_of(150)), source(tmp_path, rows_of(40, 1), "b.json")]
    data, heard = DataConfig(max_length=max_length, system="be kind"), list[int]()
    built = build(sources, template, model, data, 0, tmp_path / "out", on_rows=heard.append)
    expected = one_by_one(sources, template, model, data)
    assert samples_of(built.blocks.flat) == expected and built.proof.backend == FASTOKENS
    assert sorted(built.blocks.flat.members.tolist()) == list(range(len(expected)))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index == built.index and heard[-1] == index["rows"] == 190
    bad = sum(row["messages"] == "bad" for row in rows_of(150) + rows_of(40, 1))
    assert index["skipped"] == {"FIELD_TYPE": bad} and len(built.problems) == bad
    assert index["samples"] == len(expected) and index["dropped"] == 190 - bad - len(expected)
    assert index["truncated"] > 0 and sum(index["lengths"]["counts"]) == 190 - bad
    assert index["tokens"] == sum(len(e.ids) for e in expected)
    assert index["learned"] == sum(sum(e.mask) for e in expected)
    reopened = Blocks.open(tmp_path / "out")
    assert (reopened.labels[:] >= 0).sum() == index["learned"] and len(reopened) == index["blocks"]


def test_one_process_or_three_write_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 5000)
    sources = [source(tmp_path, rows_of(300)), source(tmp_path, rows_of(40, 1), "b.json", weight=0.5)]
    made = [build(sources, "", model, DataConfig(max_length=300), 7, tmp_path / f"out{n}", processes=n) for n in (1, 3)]
    assert len(shards.cut(sources)) > 10 and files_of(tmp_path / "out1") == files_of(tmp_path / "out3")
    assert made[0].problems == made[1].problems
    assert samples_of(made[0].blocks.flat) == one_by_one(sources, "", model, DataConfig(max_length=300))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(count=st.integers(1, 15), size=st.integers(150, 3000), seed=st.integers(0, 99))
def test_shards_hide_and_repeat_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, size: int, seed: int
) -> None:
    made = source(tmp_path, rows_of(count, seed))
    whole = list(read_rows(made.files, made.format))
    monkeypatch.setattr(shards, "SHARD_BYTES", size)
    found: list[Row | Problem] = []
    for shard in shards.cut([made]):
        before = shards.lines_before(shard)
        for row in shards.read(shard, tmp_path):
            found.append(replace(row, row=row.row + before))
    assert found == whole


def test_bad_rows_are_blamed_by_their_line_in_the_whole_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 3000)
    sources = [source(tmp_path, rows_of(200))]
    built = build(sources, "", model, DataConfig(), 0, tmp_path / "out")
    bad = [row for row in read_rows(sources[0].files, "openai") if isinstance(row, Problem)]
    assert list(built.problems) == bad and len({p.row for p in bad}) == len(bad) > 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_row_that_the_template_refuses_is_blamed(
    model: Path, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    with_template(
        model, tmp_path / "m", "{% if messages | length > 2 %}{{ raise_exception('two') }}{% endif %}" + CHATML
    )
    good, bad = ([{"role": r, "content": "x"} for _ in range(n) for r in ("user", "assistant")] for n in (1, 2))
    rows = [{"messages": m} for m in (good, bad, good)]
    with pytest.raises(InvalidArgument, match=r"files\[a.jsonl\].rows\[2\].*two") as caught:
        build([source(tmp_path, rows)], "", tmp_path / "m", DataConfig(), 0, tmp_path / "out", processes=processes)
    assert caught.value.reason == "TEMPLATE_REFUSED" and caught.value.metadata["row"] == "2"


def test_weights_repeat_rows_and_draw_parts_of_them(model: Path, tmp_path: Path) -> None:
    sources = [source(tmp_path, rows_of(60, n), f"{n}.jsonl", weight) for n, weight in enumerate((2.0, 0.5, 1.5))]
    seeds = [build(sources, "", model, DataConfig(), seed, tmp_path / f"out{seed}") for seed in (0, 0, 1)]
    counts = [made["samples"] for made in seeds[0].index["sources"]]
    times = np.bincount(seeds[0].blocks.flat.members, minlength=sum(counts))
    first, second, third = np.split(times, np.cumsum(counts)[:-1])
    assert set(first) == {2} and set(second) == {0, 1} and set(third) == {1, 2}
    assert second.sum() == round(counts[1] / 2) and third.sum() == counts[2] + round(counts[2] / 2)
    assert seeds[0].index["learned"] == (np.asarray(seeds[0].blocks.labels) >= 0).sum()
    drawn = [np.bincount(s.blocks.flat.members).tolist() for s in seeds]
    assert drawn[0] == drawn[1] != drawn[2]


def test_so_many_rows_are_drawn_by_the_seed(model: Path, tmp_path: Path) -> None:
    sources = [source(tmp_path, rows_of(40, n), f"{n}.jsonl", n + 1.0) for n in range(2)]
    made = [build(sources, "", model, DataConfig(max_rows=7), s, tmp_path / f"{n}") for n, s in enumerate((0, 0, 1))]
    drawn = [sorted(m.blocks.flat.members.tolist()) for m in made]
    assert len(drawn[0]) == 7 and drawn[0] == drawn[1] != drawn[2]
    assert made[0].index["drawn"] == 7
    assert made[0].index["learned"] == (np.asarray(made[0].blocks.labels) >= 0).sum()
    whole = build(sources, "", model, DataConfig(max_rows=10**6), 0, tmp_path / "all")
    assert len(whole.blocks.flat.members) == sum((n + 1) * s["samples"] for n, s in enumerate(whole.index["sources"]))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), 1e9])
def test_a_weight_that_makes_no_sense_is_refused(model: Path, tmp_path: Path, weight: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        build([source(tmp_path, rows_of(1), weight=weight)], "", model, DataConfig(), 0, tmp_path / "out")
    assert caught.value.reason == "WEIGHT_INVALID"


def test_one_row_is_one_block_and_no_good_row_is_an_error(model: Path, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert len(build([source(tmp_path, [good])], "", model, DataConfig(), 0, tmp_path / "one").blocks) == 1
    with pytest.raises(InvalidArgument, match=r"files\[a\.jsonl\]\.rows\[1\]") as caught:
        build([source(tmp_path, [{"messages": 3}])], "", model, DataConfig(), 0, tmp_path / "none")
    assert caught.value.reason == "DATASET_EMPTY"


def test_a_difference_in_the_data_itself_turns_fastokens_off(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(self: Tokenizer, texts: Sequence[str]) -> str:
        return "one text differs" if self._fast is not None else ""

    sources = [source(tmp_path, rows_of(50))]
    right = build(sources, "", model, DataConfig(), 0, tmp_path / "right")
    monkeypatch.setattr(Tokenizer, "compare", differs)
    built = build(sources, "", model, DataConfig(), 0, tmp_path / "out")
    assert (built.proof.backend, built.proof.reason) == (HUGGING_FACE, "one text differs")
    assert right.proof.backend == FASTOKENS
    same = [{n: b for n, b in files_of(tmp_path / f).items() if n != "index.json"} for f in ("right", "out")]
    assert same[0] == same[1]


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map("".join).filter(lambda t: bool(t.strip()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@pytest.mark.parametrize("template", [CHATML, TRIM, THINK, SHOUT])
@given(talks=st.lists(st.lists(st.tuples(texts, texts), min_size=1, max_size=2), min_size=1, max_size=12))
def test_forms_write_what_the_template_writes(model: Path, template: str, talks: list[list[tuple[str, str]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = with_template(model, Path(folder), template)
    own = load_template("", tokenizer)
    renderer = Renderer(own, tokenizer, "be kind")
    for talk in talks:
        conversation = Conversation(tuple(m for q, a in talk for m in (Message("user", q), Message("assistant", a))))
        try:
            expected = runs(own.pieces(conversation, "be kind"))
        except InvalidArgument as error:
            with pytest.raises(InvalidArgument, match=error.reason and "special token"):
                renderer.runs(conversation)
            continue
        assert renderer.runs(conversation) == expected


@pytest.mark.parametrize(
    ("body", "blind"),
    [
        ("{{ m.role }}{{ m.content }}", True),
        ("{{ '<' + m['role'] + '>' + m['content'] | trim ~ eos_token }}{% if loop.last %}x{% endif %}", True),
        ("{{ m.content.split('x')[0] }}", False),
        ("{{ m.content | upper }}", False),
        ("{% if 'x' in m.content %}y{% endif %}", False),
        ("{% set c = m.content %}{{ c }}", False),
        ("{% set c = m %}{{ c.content }}", False),
        ("{{ loop.previtem.content }}", False),
        ("{{ m }}", False),
        ("{% if m.tool_calls %}x{% endif %}", False),
        ("{% filter upper %}{{ m.content }}{% endfilter %}", False),
        ("{% macro f(x) %}{{ x }}{% endmacro %}{{ f(m.content) }}", False),
        ("{{ m.content if m.role == 'user' }}", False),
        ("{% for k in m %}{{ k }}{% endfor %}", False),
    ],
)
def test_only_templates_that_write_contents_are_believed_to(body: str, blind: bool) -> None:
    assert only_writes("{% for m in messages %}" + body + "{% endfor %}") is blind
    assert (
        only_writes(
            "{% if messages[0]['role'] == 'system' %}s{% endif %}{% for m in messages %}" + body + "{% endfor %}"
        )
        is blind
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages }}",
        "{{ messages[0].content == 'x' }}",
        "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
        "{% for",
    ],
)
def test_other_ways_to_messages_are_not_believed(source: str) -> None:
    assert not only_writes(source)
