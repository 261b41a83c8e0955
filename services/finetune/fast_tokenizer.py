"""fastokens, a quicker reader of tokenizer.json, and the texts with which `tokenizer` tries whether it is an equal one."""

from __future__ import annotations

import itertools
import json
import random
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int32]
    Offsets = NDArray[np.int64]


class Fast:
    """fastokens' tokenizer of a tokenizer.json; making one raises whatever it raises for one that it cannot read."""

    def __init__(self, data: bytes) -> None:
        from fastokens._native import Tokenizer as Backend

        without = _without_digits(data)
        self._backend = Backend.from_json_str(without or data.decode())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._apart = _other_numerals() if without else None

    def encode(self, texts: Sequence[str], plain: bool) -> tuple[Ids, Offsets] | None:
        """None if it refuses a text, as for a byte that the vocabulary lacks; Hugging Face's library leaves that out."""
        import numpy as np

        pieces = [self._pieces(text) for text in texts]
        try:
            ids, ends = self._backend.encode_batch_flat(
                list(itertools.chain.from_iterable(pieces)), add_special_tokens=False, split_special_tokens=plain
            )
        except ValueError:
            return None
        of_texts = np.cumsum([0, *map(len, pieces)])
        return np.frombuffer(ids, np.uint32).astype(np.int32), np.frombuffer(ends, np.uint64).astype(np.int64)[of_texts]

    def _pieces(self, text: str) -> Sequence[str]:
        """What is tokenised by itself: numerals that added tokens do not set apart, and what stands between them."""
        if self._apart is None or text.isascii() or not self._apart[0].search(text):
            return (text,)
        return [piece for piece in self._apart[1].split(text) if piece]


def _without_digits(data: bytes) -> str | None:
    """fastokens is five times faster with GPT-2's pre-tokenizer alone than behind one that sets digits apart, as
    SmolLM's and StarCoder's. The digits 0 to 9 are set apart as well by being added tokens, other numerals before it
    sees a text. None for a tokenizer of another kind. Whether that gives the same ids is for `accelerate` to find."""
    whole = json.loads(data)
    chain = (whole.get("pre_tokenizer") or {}).get("pretokenizers") or []
    if [p.get("type") for p in chain] != ["Digits", "ByteLevel"] or whole.get("normalizer") is not None:
        return None
    digits, byte_level = chain
    vocab, flags = whole["model"]["vocab"], ("single_word", "lstrip", "rstrip", "normalized", "special")
    apart = digits["individual_digits"] and not byte_level["add_prefix_space"] and byte_level.get("use_regex", True)
    if not apart or not all(d in vocab for d in string.digits):
        return None
    whole["pre_tokenizer"] = byte_level
    whole["added_tokens"] += [{"id": vocab[d], "content": d, **dict.fromkeys(flags, False)} for d in string.digits]
    return json.dumps(whole, ensure_ascii=False)


def _other_numerals() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """(texts that may hold them, the numerals themselves): all but 0 to 9. The first is quick: above the basic plane a
    pattern is tried range by range."""
    known = [chr(n) for n in range(0x80, 0x20000) if unicodedata.category(chr(n))[0] == "N"]
    basic = "".join(c for c in known if c < "\U00010000")
    planes = "\U00010000-\U0001efff\U0001f100-\U0001f10c\U0001fbf0-\U0001fbf9"
    return re.compile(f"[{basic}{planes}]"), re.compile(f"([{''.join(known)}])")


_FRAGMENTS = (
    "the quick brown fox", " Hello, World!", "don't we'll I'VE it's they're", "naïve café Ünïcödé", "e\u0301 a\u0308o",
    "你好，世界。", "机器学习是人工智能的一个分支", "這是繁體中文", "日本語のテキスト、カタカナ", "한국어 문장", "Привет",
    "Γειά", "مرحبا بالعالم", "שלום", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Tiếng Việt", "①②½Ⅷ٣٤५६", "3.14159", "1,234",
    "🙂🚀👍🏽", "👩\u200d👧", "🇨🇳", "2026-11-25", "0x7fff", "def f(x):\n\treturn x ** 2\n",
    "    if (a != b) { return; }\r\n", '<div class="x">&nbsp;</div>', "https://a.b/c?d=e&f=%20", "x += 1;  // TODO",
    '{"k": [1, null]}', "$\\frac{a}{b}$", "```python\n", "| a | b |\n|---|---|", "...!?--___***###", "“quoted”—‘dash’",
    " ", "  ", "   ", "\t", "\n", "\n\n", " \n ", "\r\n\r\n", "\u00a0", "\u3000", "\u200b\u200d", "\u2028", "\ufeff",
    "\x00\x01\x7f", "\ufffd", "\U0001f9ff", "a" * 32, "antidisestablishmentarianism", "<|", "|>", "[", "]", "<s", "/s>",
    "<|im", "_", "▁", "Ġ",
)  # fmt: skip


def probes(special_texts: Sequence[str]) -> Iterator[str]:
    """Thousands of texts that try what tokenizers differ in: every character, scripts, code, white space, special tokens
    and their halves, and all these beside each other."""
    yield ""
    for start in itertools.chain(
        range(0, 0xD800, 64), range(0xE000, 0x10000, 64), range(0x10000, 0x12000, 64), range(0x1D000, 0x20000, 64)
    ):
        characters = [chr(n) for n in range(start, start + 64)]
        yield "".join(characters)
        yield " a".join(characters)
    draw = random.Random(0)
    specials = list(special_texts[:64])
    for _ in range(3000):
        fragments = draw.choices(_FRAGMENTS, k=draw.randint(1, 6))
        if specials and draw.random() < 0.5:
            fragments.insert(draw.randint(0, len(fragments)), draw.choice(specials))
        yield draw.choice(("", " ", "\n")).join(fragments)
