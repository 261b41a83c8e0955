"""A tokenizer from its tokenizer.json, without transformers: preview, training and chat all come here.

Single texts are read by Hugging Face's tokenizers. Many texts may be read by fastokens, some ten times faster, after
`accelerate` has found both to give the same ids for thousands of texts.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from services.finetune.errors import FailedPrecondition
from services.finetune.fast_tokenizer import Fast, probes
from services.finetune.store.artifacts import Manifest, materialise
from services.finetune.store.port import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer as Backend

    Ids = NDArray[np.int32]
    Offsets = NDArray[np.int64]

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
)


HUGGING_FACE, FASTOKENS = "tokenizers", "fastokens"


@dataclass(frozen=True, slots=True)
class Proof:
    """Which library encodes batches, and why: `texts` were compared, `reason` says what spoke against fastokens."""

    backend: str
    texts: int
    reason: str


class Tokenizer:
    """Text to token ids and back. `digest` is the sha256 of tokenizer.json."""

    def __init__(self, data: bytes, config: dict[str, Any], template: str | None, generation: dict[str, Any]) -> None:
        self.digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self._data = data
        self._backend = _backend(data)
        self._fast: Fast | None = None
        self.config = config
        self.chat_template = template
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self.bos_id = self._backend.token_to_id(self.bos_token) if self.bos_token else None
        self.eos_ids = self._eos(generation)
        # Whether the tokenizer itself begins a text with its BOS: its post-processor knows.
        self.adds_bos = self._backend.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]
        added = self._backend.get_added_tokens_decoder()
        # ChatGLM begins with two tokens; what ends a text, with some tokenizers also an empty one, is left out.
        first = self._backend.encode("", add_special_tokens=True).ids if self.adds_bos else []
        self.opening = "".join(added[i].content for i in first if i in added and i not in self.eos_ids)
        special = {i: t for i, t in added.items() if t.special and t.content}
        self.special_texts = tuple(t.content for t in special.values())
        self.special_ids = {t.content: i for i, t in special.items()}
        # What `harmless` looks for first: few words, however many special tokens there are.
        self._beginnings = {s[:3] for s in self.special_texts}
        self._first, self._last = {s[0] for s in self.special_texts}, {s[-1] for s in self.special_texts}
        self._reach = max(map(len, self.special_texts), default=1)
        # Such tokens are found in the normalised text, where "＜s＞" may have become "<s>".
        self._normalised_ids = {i for i, t in special.items() if t.normalized and self._backend.normalizer is not None}

    @classmethod
    def from_files(cls, directory: Path) -> Self:
        """Read a model's folder. FailedPrecondition (TOKENIZER_MISSING, TOKENIZER_INVALID)."""
        path = directory / "tokenizer.json"
        if not path.exists():
            raise FailedPrecondition("the model has no tokenizer.json; import it again", reason="TOKENIZER_MISSING")
        config = {**_json(directory / "special_tokens_map.json"), **_json(directory / "tokenizer_config.json")}
        jinja = directory / "chat_template.jinja"
        template = jinja.read_text("utf-8") if jinja.exists() else _own_template(config.get("chat_template"))
        return cls(path.read_bytes(), config, template, _json(directory / "generation_config.json"))

    @classmethod
    def from_artifact(cls, store: Store, manifest: Manifest) -> Self:
        """Read a model artifact's tokenizer. FailedPrecondition (TOKENIZER_MISSING, TOKENIZER_INVALID)."""
        with tempfile.TemporaryDirectory() as folder:
            return cls.from_files(materialise(store, manifest, Path(folder), FILES))

    @property
    def backend(self) -> Backend:
        return self._backend

    @functools.cached_property
    def _plain(self) -> Backend:
        """A copy on which the texts of special tokens are only texts."""
        plain = _backend(self._data)
        plain.encode_special_tokens = True
        return plain

    def encode(self, text: str) -> list[int]:
        """Token ids; nothing is added, and the texts of special tokens become those tokens."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids; the texts of special tokens stay texts, so that what a user writes cannot steer."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], special: Sequence[bool] | None = None) -> tuple[Ids, Offsets]:
        """The ids of all texts, one after another, and where each begins and the last ends.

        The same ids as `encode`, or as `encode_plain` for texts that are not `special`.
        """
        if special is None or all(special):
            return self._batch(texts, False)
        kinds = ([n for n, s in enumerate(special) if s], [n for n, s in enumerate(special) if not s])
        parts = [(which, *self._batch([texts[n] for n in which], bool(n))) for n, which in enumerate(kinds)]
        return _joined(len(texts), parts)

    def _batch(self, texts: Sequence[str], plain: bool) -> tuple[Ids, Offsets]:
        if self._fast is None:
            return _batch_of_hugging_face(self._plain if plain else self._backend, texts)
        if found := self._fast.encode(texts, plain):
            return found
        # It refuses one of them: halves lead to it, and the others stay quick.
        if len(texts) == 1:
            return _batch_of_hugging_face(self._plain if plain else self._backend, texts)
        half = len(texts) // 2
        return _joined(
            len(texts),
            [
                (range(half), *self._batch(texts[:half], plain)),
                (range(half, len(texts)), *self._batch(texts[half:], plain)),
            ],
        )

    def accelerate(self, texts: Sequence[str] = ()) -> Proof:
        """Let fastokens encode batches if it gives the same ids as Hugging Face's tokenizers, for probes that cover all
        scripts and for `texts`, with special tokens and without; else leave all as it is."""
        tried = [*probes(self.special_texts), *texts]
        try:
            fast = Fast(self._data)
            # A plain text differs from another by special tokens only.
            steering = [t for t in tried if any(s in t for s in self.special_texts)]
            differs = self._differs(fast, tried, False) or self._differs(fast, [*steering, *texts], True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of its Rust code is no Exception
            why = (str(error).splitlines() or [""])[0][:200]
            return Proof(HUGGING_FACE, 0, f"fastokens cannot read this tokenizer: {type(error).__name__}: {why}")
        if differs:
            return Proof(HUGGING_FACE, len(tried), differs)
        self._fast = fast
        return Proof(FASTOKENS, len(tried), "")

    def adopt(self, proof: Proof) -> None:
        """Encode batches as `proof`, made of the same tokenizer in another process, found right."""
        if proof.backend != FASTOKENS:
            self._fast = None
        elif self._fast is None:
            self._fast = Fast(self._data)

    def compare(self, texts: Sequence[str]) -> str:
        """The first of `texts` for which fastokens, if it is in use, gives other ids, in words; "" if it never does."""
        return self._differs(self._fast, texts, False) if self._fast is not None else ""

    def _differs(self, fast: Fast, texts: Sequence[str], plain: bool) -> str:
        """The first text whose ids differ, in words; "" if none does."""
        refused = 0
        for at in range(0, len(texts), 16):
            few = texts[at : at + 16]
            found = fast.encode(few, plain)
            if found is None:
                refused += len(few)
                continue
            ids, places = _batch_of_hugging_face(self._plain if plain else self._backend, few)
            for text, mine, right in zip(few, _cut(*found), _cut(ids, places), strict=True):
                if mine != right:
                    return f"fastokens gives other ids{' for the plain text' if plain else ''} for {text[:80]!r}"
        return f"fastokens refuses {refused} of {len(texts)} texts" if refused * 4 > len(texts) else ""

    def harmless(self, text: str) -> bool:
        """Whether `text` can have no part in a special token, whatever stands beside it. Quick; False if in doubt."""
        if self._normalised_ids:
            return False
        looks_so = any(c in text for c in self._first) and any(s in text for s in self._beginnings)
        if looks_so and any(s in text for s in self.special_texts):
            return False
        heads, tails = self._halves
        reach = self._reach
        if len(text) < reach and any(text in s for s in self.special_texts):
            return False
        return not (
            (not self._last.isdisjoint(text[:reach]) and text.startswith(tails))
            or (not self._first.isdisjoint(text[-reach:]) and text.endswith(heads))
        )

    @functools.cached_property
    def _halves(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """All beginnings and all ends of the texts of special tokens."""
        cuts = [(s[:n], s[n:]) for s in self.special_texts for n in range(1, len(s))]
        return tuple(sorted({head for head, _ in cuts})), tuple(sorted({tail for _, tail in cuts}))

    def controls(self, text: str, start: int = 0, end: int | None = None) -> bool:
        """Whether `encode` would find a special token in `text` that touches the characters start to end."""
        stop = len(text) if end is None else end
        if start >= stop:
            return False
        if any(text.find(s, max(0, start - len(s) + 1), stop + len(s) - 1) >= 0 for s in self.special_texts):
            return True
        return bool(self._normalised_ids) and not self._normalised_ids.isdisjoint(self.encode(text[start:stop]))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def stream(self, keep: Collection[str] = ()) -> TokenStream:
        """A decoder for ids that come bit by bit; of special tokens only those in `keep` become text."""
        return TokenStream(self, keep)

    def _eos(self, generation: dict[str, Any]) -> tuple[int, ...]:
        given = generation.get("eos_token_id")
        ids = [given] if isinstance(given, int) else list(given or [])
        own = self._backend.token_to_id(self.eos_token) if self.eos_token else None
        if own is not None and own not in ids:
            ids.append(own)
        return tuple(ids)


class TokenStream:
    """Turns ids into text as they come; never gives half a character, never takes text back."""

    def __init__(self, tokenizer: Tokenizer, keep: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._silent = {i for text, i in tokenizer.special_ids.items() if text not in keep}
        self._ids: list[int] = []
        self._start = 0
        self._given = ""

    def push(self, ids: Sequence[int], last: bool = False) -> str:
        """The new text after `ids`; with `last` also what is left of a broken character."""
        self._ids += [i for i in ids if i not in self._silent]
        # Decoding starts a few tokens back: some tokenizers join what stands at a border.
        text = self._tokenizer.decode(self._ids[self._start :], skip_special=False)
        if text.endswith("\ufffd") and not last:
            return ""
        new = text[len(self._given) :]
        if len(self._ids) - self._start > 16:
            self._start = len(self._ids) - 4
            self._given = self._tokenizer.decode(self._ids[self._start :], skip_special=False)
        else:
            self._given = text
        return new


def _token_text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _own_template(given: Any) -> str | None:
    """The chat template of a tokenizer_config.json: a text, or a list of named ones."""
    if isinstance(given, list):
        given = next((t.get("template") for t in given if isinstance(t, dict) and t.get("name") == "default"), None)
    return given if isinstance(given, str) else None


def _backend(data: bytes) -> Backend:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(data.decode())
    except Exception as error:  # the library raises nothing narrower
        raise _invalid("tokenizer.json", error) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _batch_of_hugging_face(backend: Backend, texts: Sequence[str]) -> tuple[Ids, Offsets]:
    import numpy as np

    found = [np.array(e.ids, np.int32) for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    ends = np.cumsum([0, *map(len, found)], dtype=np.int64)
    return np.concatenate(found) if found else np.zeros(0, np.int32), ends


def _joined(count: int, parts: Sequence[tuple[Sequence[int], Ids, Offsets]]) -> tuple[Ids, Offsets]:
    """Parts, (which of all texts, their ids, offsets) each, as one."""
    import numpy as np

    sizes = np.zeros(count, np.int64)
    for which, _, offsets in parts:
        sizes[which] = np.diff(offsets)
    ends = np.cumsum([0, *sizes], dtype=np.int64)
    found = np.empty(ends[-1], np.int32)
    for which, ids, offsets in parts:
        for n, begin, end in zip(which, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            found[ends[n] : ends[n + 1]] = ids[begin:end]
    return found, ends


def _cut(ids: Ids, offsets: Offsets) -> list[list[int]]:
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}
    except (ValueError, TypeError, RecursionError) as error:
        raise _invalid(path.name, error) from error


def _invalid(file: str, error: Exception) -> FailedPrecondition:
    why = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return FailedPrecondition(
        f"the model's {file} cannot be read: {why}; import the model again", reason="TOKENIZER_INVALID"
    )
