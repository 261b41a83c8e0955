"""Batches: the same ids as text by text, whichever library makes them; fastokens only where it is proven."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from services.finetune import fast_tokenizer
from services.finetune.tokenizer import FASTOKENS, HUGGING_FACE, Proof, Tokenizer
from tests.tiny import SPECIALS

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern: str) -> Any:
    from tokenizers import Regex

    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False)])


def digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])


FAMILIES = {"gpt2": byte_level, "smollm": digits, "llama3": lambda: split(LLAMA3)}


def trained(directory: Path, family: str, missing: str = "") -> Path:
    """A byte-level BPE of some 3,000 tokens, learned from this repository's own texts; without the bytes `missing`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(learned(family, missing), "utf-8")
    return directory


@functools.cache
def learned(family: str, missing: str) -> str:
    root = Path(__file__).parents[2]
    texts = [
        p.read_text("utf-8") for folder in ("services", "docs") for p in sorted((root / folder).rglob("*.[pm][yd]"))
    ]
    backend = Backend(models.BPE())
    backend.pre_tokenizer = FAMILIES[family]()
    backend.decoder = decoders.ByteLevel()
    lost = {byte_level().pre_tokenize_str(c)[0][0] for c in missing}
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in lost]
    trainer = trainers.BpeTrainer(
        vocab_size=3256, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def sentencepiece_like(directory: Path) -> Path:
    """As Llama 2's: no pre-tokenizer, spaces become ▁ and one is put before the text, bytes where a piece is missing."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{n:02X}>" for n in range(256)),
        "▁",
        *"abcdefghijklmnop你好",
        "▁a",
        "bc",
        "▁abc",
    ]
    merges = [("▁", "a"), ("b", "c"), ("▁a", "bc")]
    model = models.BPE(
        {p: n for n, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    (directory / "tokenizer.json").write_text(backend.to_str(), "utf-8")
    return directory


@pytest.fixture(scope="module", params=[*FAMILIES, "llama2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp(request.param)
    made = sentencepiece_like(directory) if request.param == "llama2" else trained(directory, request.param)
    found = Tokenizer.from_files(made)
    proof = found.accelerate(["a text of the dataset's own"])
    # Where fastokens is not equal it must not be used; for the byte-level families it is known to be.
    assert (proof.backend == FASTOKENS and proof.texts > 5000) or (request.param == "llama2" and proof.reason)
    return found


def by_one(tokenizer: Tokenizer, texts: Sequence[str], special: Sequence[bool]) -> list[list[int]]:
    return [tokenizer.encode(t) if s else tokenizer.encode_plain(t) for t, s in zip(texts, special, strict=True)]


some_text = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "</s>", "<|", "|>", " ", "\n", "12", "½", "ab", "你"]),
        max_size=8,
    ).map("".join),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(st.tuples(some_text, st.booleans()), max_size=8))
def test_a_batch_is_what_its_texts_are(tokenizer: Tokenizer, texts: list[tuple[str, bool]]) -> None:
    several, special = [t for t, _ in texts], [s for _, s in texts]
    ids, offsets = tokenizer.encode_batch(several, special)
    assert [ids[a:b].tolist() for a, b in pairwise(offsets.tolist())] == by_one(tokenizer, several, special)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(before=some_text, text=some_text, after=some_text)
def test_a_harmless_text_is_in_no_special_token(tokenizer: Tokenizer, before: str, text: str, after: str) -> None:
    if text and tokenizer.harmless(text):
        assert not tokenizer.controls(before + text + after, len(before), len(before) + len(text))


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>", "|>x", "x<|im_", "m_e", "<"])
def test_what_could_be_part_of_a_special_token_is_not_harmless(tmp_path: Path, text: str) -> None:
    assert not Tokenizer.from_files(trained(tmp_path, "gpt2")).harmless(text)


def test_ids_that_differ_are_found_and_fastokens_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(data: bytes) -> str:
        """Digits are not set apart, so the last of some spaces before one goes with it."""
        whole = json.loads(data)
        whole["pre_tokenizer"] = whole["pre_tokenizer"]["pretokenizers"][1]
        return json.dumps(whole)

    found = Tokenizer.from_files(trained(tmp_path, "smollm"))
    monkeypatch.setattr(fast_tokenizer, "_without_digits", wrong)
    proof = found.accelerate(["x    1"])
    assert proof.backend == HUGGING_FACE and "other ids" in proof.reason
    assert found.encode_batch(["x    1"])[0].tolist() == found.encode("x    1")
    # Who adopts it without a proof is told by the first text of its own that differs.
    found.adopt(Proof(FASTOKENS, 0, ""))
    assert found.compare(["words"]) == "" and "'x    1'" in found.compare(["words", "x    1"])


def test_every_numeral_is_set_apart(tmp_path: Path) -> None:
    found = Tokenizer.from_files(trained(tmp_path, "smollm"))
    assert found.accelerate().backend == FASTOKENS
    texts = ["1 and 2", "①②  ½ Ⅷ ٣<|im_end|>", "你好 2", "a ²b", "\U0001d7d8\U0001d7d9", "½"]
    ids, offsets = found.encode_batch(texts)
    assert [ids[a:b].tolist() for a, b in pairwise(offsets.tolist())] == by_one(found, texts, [True] * 6)


def test_without_fastokens_all_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Tokenizer.from_files(trained(tmp_path, "gpt2"))
    monkeypatch.setitem(sys.modules, "fastokens._native", None)
    proof = found.accelerate()
    assert proof.backend == HUGGING_FACE and "fastokens" in proof.reason
    assert found.encode_batch(["some words"])[0].tolist() == found.encode("some words")


def test_a_byte_that_the_vocabulary_lacks_is_left_out_as_ever(tmp_path: Path) -> None:
    found = Tokenizer.from_files(trained(tmp_path, "gpt2", missing="\x04"))
    assert found.accelerate().backend == FASTOKENS
    ids, _ = found.encode_batch(["a\x04b", "words"])
    assert ids.tolist() == [*found.encode("a\x04b"), *found.encode("words")]
