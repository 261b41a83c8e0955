"""Older tokenizers to tokenizer.json with the same ids: sentencepiece models, and Qwen's tiktoken file.

What the packages' own Python would add is kept as data: special tokens by id, and whether a text begins with BOS.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.finetune.convert.families import Family
from services.finetune.errors import FailedPrecondition

_NORMAL, _UNKNOWN, _USER_DEFINED, _UNUSED = 1, 2, 4, 5
_BPE = 2
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_CHATGLM2 = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
"""Ids that ChatGLM's Python puts after its sentencepiece model. It calls two of them sop and eop; in angle brackets they
cannot be met in a word such as "soprano"."""
_CHATGLM3 = (*_CHATGLM2, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_LIKE = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "YiTokenizer", "MistralTokenizer")


@dataclass(frozen=True, slots=True)
class Extra:
    """What stands beside a vocabulary: special tokens by text, the roles that some play, what a text begins with."""

    tokens: Mapping[str, int | None]
    roles: Mapping[str, str]
    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further keys for tokenizer_config.json."""


def make_tokenizer(source: Path, out: Path, family: Family | None, config: Mapping[str, Any]) -> bool:
    """Write tokenizer.json and tokenizer_config.json into `out`, if `source` has a model of a kind known here; `config`
    is the original tokenizer_config.json. FailedPrecondition (TOKENIZER_MISSING) if that model is damaged or odd."""
    if family is not None and family.name == "qwen":
        ranks = _read_tiktoken(_only(source, "*.tiktoken"))
        _save(_from_ranks(ranks), _qwen_extra(source, config, len(ranks)), out)
        return True
    known = family is not None or str(config.get("tokenizer_class")) in LLAMA_LIKE
    if not known or not (source / "tokenizer.model").is_file():
        return False
    model = _read_sentencepiece(source / "tokenizer.model")
    size = len(model.pieces)
    extra = _chatglm_extra(source, config, size) if family and family.name == "chatglm" else _extra(source, config)
    _save(_from_pieces(model, extra), extra, out)
    return True


def _save(backend: Any, extra: Extra, out: Path) -> None:
    from tokenizers import AddedToken, processors

    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in extra.tokens])
    for text, wanted in extra.tokens.items():
        if wanted is not None and backend.token_to_id(text) != wanted:
            raise _missing(f"the special token {text} should have id {wanted}, and another has it")
    around = {t: backend.token_to_id(t) for t in (*extra.begins, *extra.ends)}
    if around:
        form = " ".join((*extra.begins, "$A", *extra.ends))
        second = form.replace("$A", "$B:1")
        backend.post_processor = processors.TemplateProcessing(
            single=form, pair=f"{form} {second}", special_tokens=list(around.items())
        )
    backend.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **extra.roles}
    (out / "tokenizer_config.json").write_text(
        json.dumps({**config, **extra.more}, ensure_ascii=False, indent=2, sort_keys=True)
    )


# ---------------------------------------------------------------------------------------------- special tokens


def _extra(source: Path, config: Mapping[str, Any]) -> Extra:
    """Special tokens by the plain files beside a tokenizer."""
    given = {**_json(source / "special_tokens_map.json"), **config}
    tokens: dict[str, int | None] = {}
    for number, token in dict(given.get("added_tokens_decoder") or {}).items():
        tokens[_text(token)] = int(number)
    tokens |= {str(k): int(v) for k, v in _json(source / "added_tokens.json").items()}
    roles = {role: _text(given[role]) for role in _ROLES if given.get(role)}
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **roles}
    for text in (*map(_text, given.get("additional_special_tokens") or ()), *roles.values()):
        tokens.setdefault(text, None)
    begins = (roles["bos_token"],) if given.get("add_bos_token", True) else ()
    ends = (roles["eos_token"],) if given.get("add_eos_token", False) else ()
    return Extra(tokens, roles, begins, ends, _more(config))


def _chatglm_extra(source: Path, config: Mapping[str, Any], size: int) -> Extra:
    texts = _CHATGLM3 if is_chatglm3(source, config) else _CHATGLM2
    roles = {"bos_token": "[gMASK]", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokens: dict[str, int | None] = {"</s>": None, "<unk>": None, **{t: size + n for n, t in enumerate(texts)}}
    return Extra(tokens, roles, ("[gMASK]", "<sop>"), (), _more(config))


def is_chatglm3(source: Path, config: Mapping[str, Any]) -> bool:
    """ChatGLM2 and 3 have one architecture, one vocabulary and one name for it; only 3 has tokens for roles."""
    named = str(_json(source / "config.json").get("_name_or_path", "")).lower()
    return "chatglm3" in named or "<|user|>" in json.dumps(config)


def _qwen_extra(source: Path, config: Mapping[str, Any], size: int) -> Extra:
    chat = _json(source / "generation_config.json").get("chat_format") == "chatml"
    end = "<|im_end|>" if chat else "<|endoftext|>"
    roles = {"eos_token": end, "pad_token": "<|endoftext|>"}
    return Extra({t: size + n for n, t in enumerate(_QWEN)}, roles, (), (), _more(config))


def _more(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: config[k] for k in ("chat_template", "model_max_length", "padding_side") if config.get(k) is not None}


def _text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token)


# ---------------------------------------------------------------------------------------------- sentencepiece


def _read_sentencepiece(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError lies elsewhere in each of its versions
        raise _missing(f"{path.name} is no sentencepiece model: {error}") from error
    if model.trainer_spec.model_type != _BPE or not model.pieces:
        raise _missing(f"{path.name} is no BPE model")
    if model.trainer_spec.treat_whitespace_as_suffix or any(p.type == _UNUSED for p in model.pieces):
        raise _missing(f"{path.name} uses unused pieces or trailing blanks, which tokenizer.json cannot say")
    return model


def _from_pieces(model: Any, extra: Extra) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    texts = _texts(model, extra)
    spec, unknown = model.trainer_spec, next((i for i, p in enumerate(model.pieces) if p.type == _UNKNOWN), None)
    own = [p.piece for p in model.pieces if p.type == _USER_DEFINED]
    normal = {p.piece: p.score for p in model.pieces if p.type == _NORMAL}
    core = models.BPE(
        vocab={t: n for n, t in enumerate(texts)},
        merges=_merges(normal),
        unk_token=texts[unknown] if unknown is not None else None,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        # A user-defined piece is a word of its own, and no merges lead to it.
        ignore_merges=bool(own),
    )
    backend = Tokenizer(core)
    backend.normalizer = normalizers.Sequence(_normalizers(model.normalizer_spec))
    if own:
        choice = "|".join(re.escape(t) for t in sorted(own, key=len, reverse=True))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(choice), "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if model.normalizer_spec.add_dummy_prefix else []
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(parts)
    return backend


def _texts(model: Any, extra: Extra) -> list[str]:
    """The text of each id: the pieces', but where a special token has taken the id."""
    texts = [p.piece for p in model.pieces]
    for text, number in extra.tokens.items():
        if number is not None and 0 <= number < len(texts) + 10_000:
            texts += [f"<|hole_{n}|>" for n in range(len(texts), number + 1)]
            texts[number] = text
    if len(set(texts)) != len(texts):
        raise _missing("two ids have one text")
    return texts


def _normalizers(spec: Any) -> list[Any]:
    from tokenizers import Regex, normalizers

    found: list[Any] = []
    if spec.precompiled_charsmap:
        found.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        found += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        found.append(normalizers.Prepend(" "))
    return [*found, normalizers.Replace(" ", "▁")]


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best first, as sentencepiece joins them."""
    found = [(-scores[whole], left, right) for whole in scores for left, right in _halves(whole, scores)]
    return [(left, right) for _, left, right in sorted(found, key=lambda m: (m[0], len(m[1]), len(m[2])))]


def _halves(whole: Any, known: Any) -> Iterable[tuple[Any, Any]]:
    pairs = ((whole[:n], whole[n:]) for n in range(1, len(whole)))
    return [(left, right) for left, right in pairs if left in known and right in known]


# ---------------------------------------------------------------------------------------------- tiktoken


def _read_tiktoken(path: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise _missing(f"{path.name} is no tiktoken file: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([n]) not in ranks for n in range(256)):
        raise _missing(f"{path.name} is cut off")
    return ranks


def _from_ranks(ranks: Mapping[bytes, int]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = _byte_letters()

    def text(token: bytes) -> str:
        return token.decode("latin-1").translate(letters)

    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        pairs = sorted(_halves(token, ranks), key=lambda p: (ranks[p[0]], ranks[p[1]]))
        merges += [(text(left), text(right)) for left, right in pairs]
    vocab = {text(token): rank for token, rank in ranks.items()}
    # tiktoken takes a whole word that it knows, before it looks at pairs.
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated")
    parts: list[Any] = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_letters() -> dict[int, int]:
    """GPT-2's letters for bytes: the printable stand for themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [n for n in range(256) if n not in printable]
    return {n: n for n in printable} | {n: 256 + i for i, n in enumerate(others)}


# ---------------------------------------------------------------------------------------------- files


def _only(source: Path, pattern: str) -> Path:
    found = list(source.glob(pattern))
    if len(found) != 1:
        raise _missing(f"the model has {len(found)} files {pattern}, not one")
    return found[0]


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise _missing(f"{path.name} is no JSON: {error}") from error
    return data if isinstance(data, dict) else {}


def _missing(why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"no tokenizer.json can be made: {why}; add the model's tokenizer.json", reason="TOKENIZER_MISSING"
    )
