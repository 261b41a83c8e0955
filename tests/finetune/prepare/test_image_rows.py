"""Rows with images to blocks: what transformers' LlavaProcessor makes of them, whole images, whoever's they are."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from services.finetune.config import DataConfig
from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.finetune.formats import Row, read_rows
from services.finetune.orders import ArtifactRef, PrepareRun, ValidateRun
from services.finetune.packing import HELD_OUT, IGNORED, Blocks
from services.finetune.prepare import prepare, shards
from services.finetune.prepare.pipeline import Built, build
from services.finetune.prepare.shards import Source
from services.finetune.prepare.validate import validate
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, load, materialise, publish, publish_directory
from services.finetune.templates import IMAGE_ID, Encoded, encode, load_template
from services.finetune.tokenizer import HUGGING_FACE, Proof, Tokenizer
from services.finetune.vision import read_form, spread
from tests.finetune.prepare.conftest import do
from tests.finetune.test_vision import processor
from tests.tiny import tiny_sight, tiny_tokenizer

TOKENS = 4
PICTURES = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sight(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """To prove fastokens right takes longer than all that is done here."""
    monkeypatch.setattr(Tokenizer, "accelerate", lambda self: Proof(HUGGING_FACE, 0, ""))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """Image files by path in the artifact: digest, path on disk. The last is a copy of the first."""
    folder, found = tmp_path_factory.mktemp("pictures"), {}
    for n in range(PICTURES):
        path = folder / f"{n}.png"
        Image.new("RGB", (30 + n % (PICTURES - 1), 40), (n % (PICTURES - 1), 0, 0)).save(path)
        found[f"images/{n}.png"] = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest(), path
    return found


def row(draw: random.Random, images: int, turns: int = 1) -> dict[str, Any]:
    """A row of so many images; with none it is a text that may hold their mark."""
    said = [
        {
            "from": who,
            "value": "".join(draw.choices(("what ", "<im", "<|im_end|>", "是 ", "x\n"), k=draw.randint(1, 9))),
        }
        for _ in range(turns)
        for who in ("human", "gpt")
    ]
    for _ in range(images):
        turn = draw.choice(said[::2])
        turn["value"] = f"<image>\n{turn['value']}"
    if not images:
        said[1]["value"] += "<image>"
    names = [f"{draw.randrange(PICTURES)}.png" for _ in range(images)]
    given = {"image": names[0]} if images == 1 else {"images": names} if images else {}
    return {"id": "a", "conversations": said, **given}


def source(
    folder: Path, rows: Sequence[object], pictures: dict[str, tuple[str, Path]], name: str = "images/a.jsonl"
) -> Source:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Source(name="d", files=((name, path),), format="sharegpt", images=pictures)


def rows_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [row(draw, draw.choice((0, 1, 1, 2, 3)), draw.randint(1, 3)) for _ in range(count)]


def samples_of(built: Built) -> list[tuple[list[int], list[bool], list[str]]]:
    """Ids, mask and digests of images of each sample."""
    flat, found = built.blocks.flat, []
    for n in range(len(flat.offsets) - 1):
        ids, mask = flat.sample(n)
        seen: list[int] = []
        if flat.pictures is not None:
            seen = flat.pictures.numbers[flat.pictures.offsets[n] : flat.pictures.offsets[n + 1]].tolist()
        found.append((ids.tolist(), mask.tolist(), [built.blocks.image_files[i] for i in seen]))
    return found


def test_ids_and_labels_are_those_of_transformers(
    model: Path, tmp_path: Path, pictures: dict[str, tuple[str, Path]]
) -> None:
    rows = rows_of(100)
    built = build([source(tmp_path, rows, pictures)], "", model, DataConfig(), 0, tmp_path / "out")
    theirs, found = processor(model, "clip"), samples_of(built)
    assert len(found) == 100
    for read, (ids, mask, seen) in zip(
        read_rows([("images/a.jsonl", tmp_path / "a.jsonl")], "sharegpt"), found, strict=True
    ):
        assert isinstance(read, Row)
        talk, files = read.conversation, [pictures[f"images/{name}"] for name in read.conversation.images]
        assert seen == [digest for digest, _ in files]
        if any("<|im_end|>" in m.content or ("<image>" in m.content and m.role != "user") for m in talk.messages):
            continue  # transformers takes what somebody wrote for special tokens
        said = [{"role": m.role, "content": m.content} for m in talk.messages]
        expected: list[bool] = []
        for n in range(0, len(said), 2):
            upto = theirs.tokenizer.apply_chat_template(said[: n + 1], tokenize=False, add_generation_prompt=True)
            answer = upto + said[n + 1]["content"] + "<|im_end|>"
            shown = [str(path) for _, path in files[: answer.count("<image>")]] or None
            for text, learned in ((upto, False), (answer, True)):
                taken = theirs(text=text, images=shown)["input_ids"][0]
                expected += [learned] * (len(taken) - len(expected))
        whole = theirs.tokenizer.apply_chat_template(said, tokenize=False)
        shown = [str(path) for _, path in files] or None
        assert ids == theirs(text=whole, images=shown)["input_ids"][0]
        assert mask == [*expected, *[False] * (len(ids) - len(expected))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), most=st.integers(8, 120), pack=st.booleans())
def test_no_image_is_cut(
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pictures: dict[str, tuple[str, Path]],
    seed: int,
    count: int,
    most: int,
    pack: bool,
) -> None:
    folder, rows = tmp_path_factory.mktemp("rows"), rows_of(count, seed)
    made = source(folder, rows, pictures)
    expected, cut, lost = [], 0, 0
    form = read_form(model)
    assert form is not None
    for ids, mask, seen in one_by_one(model, made):
        end = most
        if len(ids) > most:
            cut += 1
            starts = [n for n in range(len(ids)) if ids[n] == 259 and ids[:n].count(259) % TOKENS == 0]
            end = next((s for s in starts if s < most < s + TOKENS), most)
        marks = [IMAGE_ID if i == 259 else i for n, i in enumerate(ids) if i != 259 or ids[:n].count(259) % TOKENS == 0]
        shown = spread(Encoded(marks, [False] * len(marks)), form, most)
        assert shown.ids == ids[:end] and spread(Encoded(marks, [False] * len(marks)), form).ids == ids
        mask = [False, *mask[1:end]]
        if any(mask):
            kept = ids[:end].count(259) // TOKENS
            expected.append((ids[:end], mask, seen[:kept]))
            lost += len(seen) - kept
    try:
        built = build([made], "", model, DataConfig(max_length=most, pack=pack), 0, folder / "out")
    except InvalidArgument as error:
        assert error.reason == "DATASET_EMPTY" and not expected
        return
    assert samples_of(built) == expected
    assert (built.index["truncated"], built.index["dropped"]) == (cut, count - len(expected))
    images = built.index.get("images", {"count": 0, "cut": 0})
    assert images == {"count": sum(len(s) for _, _, s in expected), "cut": lost}
    check_blocks(Blocks.open(folder / "out"), expected)


def one_by_one(model: Path, made: Source) -> list[tuple[list[int], list[bool], list[str]]]:
    """What preview and chat say of each row, each image as its tokens; nothing is cut."""
    tokenizer, found = Tokenizer.from_files(model), []
    template, form = load_template("", tokenizer), read_form(model)
    assert form is not None and (form.token_id, form.tokens) == (259, TOKENS)
    for read in read_rows(made.files, made.format):
        assert isinstance(read, Row) and made.images is not None
        encoded = encode(template.pieces(read.conversation), tokenizer, IMAGE_ID)
        times = [TOKENS if i == IMAGE_ID else 1 for i in encoded.ids]
        ids = [259 if i == IMAGE_ID else i for i, n in zip(encoded.ids, times, strict=True) for _ in range(n)]
        mask = [m for m, n in zip(encoded.mask, times, strict=True) for _ in range(n)]
        found.append((ids, mask, [made.images[f"images/{name}"][0] for name in read.conversation.images]))
    return found


def check_blocks(blocks: Blocks, expected: Sequence[tuple[list[int], list[bool], list[str]]]) -> None:
    """Each block's images stand in the order of their spans, which are whole and not learned."""
    for block in range(len(blocks)):
        members = blocks.flat.members[blocks.flat.starts[block] : blocks.flat.starts[block + 1]]
        numbers = blocks.images_of(block)
        assert numbers.dtype == np.int32
        assert [blocks.image_files[n] for n in numbers] == [i for m in members for i in expected[m][2]]
        at = blocks.ids[block] == 259
        assert at.sum() == TOKENS * len(numbers) and (blocks.labels[block][at] == IGNORED).all()
        for segment, member in enumerate(members, 1):
            here = blocks.segments[block] == segment
            assert blocks.ids[block][here].tolist() == expected[member][0]
            assert blocks.positions[block][here].tolist() == list(range(here.sum()))


def test_equal_files_are_one_and_unused_ones_are_none(
    model: Path, tmp_path: Path, pictures: dict[str, tuple[str, Path]]
) -> None:
    said = [{"from": "human", "value": "<image><image><image>?"}, {"from": "gpt", "value": "a"}]
    rows = [{"conversations": said, "images": ["5.png", "0.png", f"{PICTURES - 1}.png"]}]
    built = build([source(tmp_path, rows, pictures)], "", model, DataConfig(), 0, tmp_path / "out")
    first, fifth = pictures["images/0.png"][0], pictures["images/5.png"][0]
    assert built.blocks.image_files == (first, fifth) and built.blocks.images_of(0).tolist() == [1, 0, 0]


def test_texts_stay_what_they_are_for_a_model_that_sees(
    model: Path, tmp_path: Path, pictures: dict[str, tuple[str, Path]]
) -> None:
    blind, rows = tiny_tokenizer(tmp_path / "blind"), [row(random.Random(n), 0) for n in range(20)]
    made = source(tmp_path, rows, pictures)
    for name, base in (("blind", blind), ("seeing", model)):
        build([made], "", base, DataConfig(), 0, tmp_path / f"{name}-out")
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / f"{n}-out").iterdir()} for n in ("blind", "seeing"))
    assert set(ours) == {f"{n}.bin" for n in ("tokens", "mask", "offsets", "members", "starts")} | {"index.json"}
    assert all(ours[n] == theirs[n] for n in ours if n != "index.json") and set(ours) == set(theirs)
    assert "images" not in json.loads(theirs["index.json"])
    opened = Blocks.open(tmp_path / "seeing-out")
    assert opened.image_files == () and opened.images_of(0).tolist() == []


def test_one_process_or_two_write_the_same_bytes(
    model: Path, tmp_path: Path, pictures: dict[str, tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 3000)
    made = source(tmp_path, rows_of(60), pictures)
    for n in (1, 2):
        build([made], "", model, DataConfig(), 7, tmp_path / f"{n}", processes=n, held_out=0.2)
    files = [{p.name: p.read_bytes() for p in (tmp_path / f"{n}").rglob("*.*")} for n in (1, 2)]
    assert files[0] == files[1] and {"images.bin", "image_offsets.bin", "images.json"} <= set(files[0])
    whole, apart = Blocks.open(tmp_path / "1"), Blocks.open(tmp_path / "1", HELD_OUT)
    assert len(apart) and apart.image_files == whole.image_files


def test_equal_questions_about_other_images_are_distinct(
    model: Path, tmp_path: Path, pictures: dict[str, tuple[str, Path]]
) -> None:
    said = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    rows = [{"conversations": said, "image": f"{n % 4}.png"} for n in range(12)]
    built = build([source(tmp_path, rows, pictures)], "", model, DataConfig(), 0, tmp_path / "out", held_out=0.25)
    apart = Blocks.open(tmp_path / "out", HELD_OUT)
    kept = {int(n) for blocks in (apart,) for b in range(len(blocks)) for n in blocks.images_of(b)}
    learned = {int(n) for b in range(len(built.blocks)) for n in built.blocks.images_of(b)}
    assert len(kept) == 1 and len(learned) == 3 and not kept & learned


def test_rows_with_bad_images_are_left_out_and_told(
    model: Path, tmp_path: Path, pictures: dict[str, tuple[str, Path]]
) -> None:
    (tmp_path / "torn.png").write_bytes(pictures["images/0.png"][1].read_bytes()[:60])
    files = {**pictures, "images/torn.png": ("sha256:torn", tmp_path / "torn.png")}
    said = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    rows: list[object] = [{"conversations": said, "image": f"{name}.png"} for name in ("0", "torn", "gone", "1")]
    rows.append({"conversations": said, "images": ["0.png", "1.png"]})
    built = build([source(tmp_path, rows, files)], "", model, DataConfig(), 0, tmp_path / "out")
    assert built.index["skipped"] == {"IMAGE_COUNT": 1, "IMAGE_INVALID": 1, "IMAGE_MISSING": 1}
    assert [(p.row, p.reason) for p in built.problems] == [
        (2, "IMAGE_INVALID"),
        (3, "IMAGE_MISSING"),
        (5, "IMAGE_COUNT"),
    ]
    assert len(built.blocks.flat.offsets) - 1 == 2 and "sha256:torn" not in built.blocks.image_files


def test_a_model_that_sees_nothing_refuses_images(tmp_path: Path, pictures: dict[str, tuple[str, Path]]) -> None:
    blind = tiny_tokenizer(tmp_path / "blind")
    with pytest.raises(InvalidArgument, match=r"rows\[1\]") as caught:
        build([source(tmp_path, [row(random.Random(0), 1)], pictures)], "", blind, DataConfig(), 0, tmp_path / "out")
    assert caught.value.reason == "IMAGES_UNSUPPORTED"


def test_a_model_whose_token_is_not_there_is_refused(tmp_path: Path, pictures: dict[str, tuple[str, Path]]) -> None:
    base = tiny_sight(tmp_path / "model")
    tiny_tokenizer(base)
    with pytest.raises(FailedPrecondition) as caught:
        build([source(tmp_path, [row(random.Random(0), 1)], pictures)], "", base, DataConfig(), 0, tmp_path / "out")
    assert caught.value.reason == "IMAGE_TOKEN_MISSING"


def test_jobs_count_images_and_tell_bad_ones(
    file_store: Store, model: Path, tmp_path: Path, pictures: dict[str, tuple[str, Path]]
) -> None:
    said = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    rows: list[dict[str, Any]] = [{"conversations": said, "image": f"images/{n}.png"} for n in (0, 1, 0, 2)]
    rows.append({"conversations": [{**said[0], "value": "?"}, said[1]]})
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    files = {"rows.jsonl": lines, "images/2.png": b"%PDF-1.7"}
    files |= {name: pictures[name][1].read_bytes() for name in ("images/0.png", "images/1.png")}
    blobs = {name: file_store.put_blob(data) for name, data in files.items()}
    meta = {"format": "sharegpt", "rows": 5, "skipped_rows": 0}
    manifest = Manifest("dataset", tuple(File(n, b.digest, b.size) for n, b in blobs.items()), (), meta)
    revision = ArtifactRef(name="workspaces/w/datasets/d/revisions/r", digest=publish(file_store, manifest))
    base = ArtifactRef(name="m", digest=publish_directory(file_store, "base", model, meta={"template": "tokenizer"}))
    data = DataConfig(template="tokenizer")
    order = PrepareRun(job="p", model=base, datasets=(revision,), data=data)
    result, events = do(prepare, order, file_store, tmp_path / "p")
    made = load(file_store, result["prepared"])
    assert made.meta["images"] == {"count": 3, "cut": 0} and made.meta["skipped"] == {"IMAGE_INVALID": 1}
    assert [p.digest for p in made.parents] == [revision.digest]
    warning = next(e["text"] for e in events if e["type"] == "log" and e["level"] == "warning")
    assert "1 IMAGE_INVALID" in warning and "files[rows.jsonl].rows[4].images[0]" in warning
    assert "3 images, 0 of them cut off" in events[-1]["text"]
    blocks = Blocks.open(materialise(file_store, made, tmp_path / "blocks"))
    assert set(blocks.image_files) == {blobs["images/0.png"].digest, blobs["images/1.png"].digest}
    asked = ValidateRun(job="v", dataset=revision, model=base, template="tokenizer", max_length=2048)
    found = json.loads(b"".join(file_store.read_blob(do(validate, asked, file_store, tmp_path / "v")[0]["report"])))
    assert found["images"] == {"row_count": 4, "image_count": 4, "good_count": 2, "token_count": 3 * TOKENS}
    assert found["tokens"]["token_count"] == made.meta["tokens"] and found["causes"] == {"IMAGE_INVALID": 1}
    blind = publish_directory(file_store, "base", tiny_tokenizer(tmp_path / "blind"), meta={"template": "tokenizer"})
    asked = ValidateRun(job="v", dataset=revision, model=ArtifactRef(name="b", digest=blind), template="tokenizer")
    found = json.loads(b"".join(file_store.read_blob(do(validate, asked, file_store, tmp_path / "w")[0]["report"])))
    assert found["causes"] == {"IMAGES_UNSUPPORTED": 3, "IMAGE_INVALID": 1}
