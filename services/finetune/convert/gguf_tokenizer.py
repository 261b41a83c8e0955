"""A tokenizer.json as GGUF says it: tokens, their kinds and scores or merges, the pre-tokenizer's name, special tokens.

llama.cpp holds its pre-tokenizers in code, by name (`llm_load_vocab` in src/llama-vocab.cpp); a tokenizer that splits text
in a way that has no name there is refused, because ids would differ from those that training saw.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.finetune.errors import FailedPrecondition
from services.finetune.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of tokens."""
_GPT2 = "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_TEKKEN,): "tekken",
}
"""The ways of splitting, in their order, by llama.cpp's name of the whole."""


def add_tokenizer(
    writer: Any, folder: Path, vocab_size: int, warn: Callable[[str], None], template: str | None
) -> None:
    """Write the tokenizer of a model folder into a `gguf.GGUFWriter`. FailedPrecondition (TOKENIZER_UNSUPPORTED)."""
    data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    model, own = data["model"], Tokenizer.from_files(folder)
    if model.get("type") != "BPE":
        raise _unsupported(f"it is of type {model.get('type')}, and only BPE is known")
    texts, kinds = _tokens(data, vocab_size)
    splits = _splits(data.get("pre_tokenizer"))
    if splits is not None and splits[-1:] != ["bytes"]:
        _add_pieces(writer, data, texts, kinds, _pieces(folder), warn)
    else:
        name = PRE_TOKENIZERS.get(tuple(splits[:-1])) if splits is not None else None
        if name is None:
            raise _unsupported(f"llama.cpp has no name for the way in which it splits text: {data['pre_tokenizer']}")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
        if data.get("normalizer"):
            warn("llama.cpp does not normalise text (NFC): composed characters may get other ids there")
    _add_special(writer, own)
    if template:
        writer.add_chat_template(template)


def _tokens(data: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of each id; rows of the embeddings that no token has are UNUSED."""
    texts: dict[int, str] = {n: t for t, n in data["model"]["vocab"].items()}
    added = {t["id"]: t for t in data.get("added_tokens", ())}
    texts |= {n: t["content"] for n, t in added.items()}
    if texts and max(texts) >= vocab_size:
        raise _unsupported(f"it has id {max(texts)}, and the embeddings have {vocab_size} rows")
    kinds = [NORMAL if n in texts else UNUSED for n in range(vocab_size)]
    for n, token in added.items():
        kinds[n] = CONTROL if token["special"] else USER_DEFINED
    return [texts.get(n, f"[PAD{n}]") for n in range(vocab_size)], kinds


def _splits(pre: Mapping[str, Any] | None) -> list[str] | None:
    """How text is split, one word or pattern a step, "bytes" last if it then becomes bytes; None if that is not known."""
    found: list[str] = []
    for part in pre.get("pretokenizers", [pre]) if pre else []:
        kind = part["type"]
        if kind == "Digits" and part["individual_digits"]:
            found.append("digits")
        elif kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            found.append(part["pattern"].get("Regex") or part["pattern"]["String"])
        elif kind == "ByteLevel" and not part["add_prefix_space"]:
            found += [_GPT2, "bytes"] if part["use_regex"] else ["bytes"]
        elif kind == "Metaspace":
            continue
        else:
            return None
    return found


# ---------------------------------------------------------------------------------------------- sentencepiece


def _add_pieces(
    writer: Any,
    data: Mapping[str, Any],
    texts: list[str],
    kinds: list[int],
    pieces: Sequence[Any],
    warn: Callable[[str], None],
) -> None:
    model = data["model"]
    scores = _scores(model["merges"], texts)
    for n, piece in enumerate(pieces[: len(texts)]):
        if piece.piece == texts[n]:
            scores[n] = piece.score
            kinds[n] = kinds[n] if kinds[n] in (CONTROL, USER_DEFINED) else piece.type
    for n, text in enumerate(texts):
        if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and kinds[n] == NORMAL:
            kinds[n] = BYTE
    if model.get("unk_token") in texts:
        kinds[texts.index(model["unk_token"])] = UNKNOWN
    steps = _steps(data.get("normalizer"))
    odd = [s["type"] for s in steps if s["type"] not in ("Prepend", "Replace")]
    if odd:
        warn(f"llama.cpp does not normalise text ({', '.join(odd)}): some texts may get other ids there")
    pre = _steps(data.get("pre_tokenizer"), "pretokenizers")
    prefix = any(s["type"] == "Prepend" for s in steps)
    prefix |= any(s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never" for s in pre)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(prefix)


def _scores(merges: Sequence[Any], texts: Sequence[str]) -> list[float]:
    """llama.cpp joins the pair whose whole has the highest score; merges are tried in their order. The same, if all
    merges that make one token stand together. FailedPrecondition (TOKENIZER_UNSUPPORTED) if they do not."""
    first: dict[str, int] = {}
    last = ""
    for n, merge in enumerate(merges):
        whole = "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)
        if whole != last and whole in first:
            raise _unsupported(
                f"the merges that make {whole!r} do not stand together, so that no score says their order"
            )
        first.setdefault(whole, n)
        last = whole
    return [float(-first.get(text, len(merges))) for text in texts]


def _pieces(folder: Path) -> Sequence[Any]:
    """The pieces of the sentencepiece model that lies beside tokenizer.json, if there is one: its scores and kinds."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        return ()
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # a tokenizer.model of another kind, as tiktoken's; protobuf's errors move between its versions
        return ()
    return list(model.pieces)


def _steps(part: Mapping[str, Any] | None, key: str = "normalizers") -> list[Mapping[str, Any]]:
    return list(part.get(key, [part])) if part else []


# ---------------------------------------------------------------------------------------------- special tokens


def _add_special(writer: Any, tokenizer: Tokenizer) -> None:
    def number(key: str) -> int | None:
        token = tokenizer.config.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        return tokenizer.backend.token_to_id(text) if text else None

    eos = number("eos_token")
    ends = [n for n in tokenizer.eos_ids if n != eos]
    add = {
        writer.add_bos_token_id: tokenizer.bos_id,
        writer.add_eos_token_id: eos if eos is not None else next(iter(ends), None),
        # What ends a turn, where that is not what ends a text.
        writer.add_eot_token_id: ends[0] if ends and eos is not None else None,
        writer.add_unk_token_id: number("unk_token"),
        writer.add_pad_token_id: number("pad_token"),
    }
    for write, value in add.items():
        if value is not None:
            write(value)
    writer.add_add_bos_token(bool(tokenizer.adds_bos))


def _unsupported(why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the tokenizer cannot be said in GGUF: {why}; export another form", reason="TOKENIZER_UNSUPPORTED"
    )
