"""A tokenizer from its tokenizer.json, without transformers: preview, training and chat all come here."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from services.finetune.errors import FailedPrecondition
from services.finetune.store.artifacts import Manifest, materialise
from services.finetune.store.port import Store

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
)


class Tokenizer:
    """Text to token ids and back. `digest` is the sha256 of tokenizer.json."""

    def __init__(self, data: bytes, config: dict[str, Any], template: str | None, generation: dict[str, Any]) -> None:
        self.digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self._backend, self._plain = _backend(data), _backend(data)
        # On this copy the texts of special tokens are only texts.
        self._plain.encode_special_tokens = True
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

    def encode(self, text: str) -> list[int]:
        """Token ids; nothing is added, and the texts of special tokens become those tokens."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids; the texts of special tokens stay texts, so that what a user writes cannot steer."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

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

    def stream(self) -> TokenStream:
        """A decoder for ids that come bit by bit."""
        return TokenStream(self)

    def _eos(self, generation: dict[str, Any]) -> tuple[int, ...]:
        given = generation.get("eos_token_id")
        ids = [given] if isinstance(given, int) else list(given or [])
        own = self._backend.token_to_id(self.eos_token) if self.eos_token else None
        if own is not None and own not in ids:
            ids.append(own)
        return tuple(ids)


class TokenStream:
    """Turns ids into text as they come; never gives half a character, never takes text back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._given = ""

    def push(self, ids: Sequence[int], last: bool = False) -> str:
        """The new text after `ids`; with `last` also what is left of a broken character."""
        self._ids += ids
        # Decoding starts a few tokens back: some tokenizers join what stands at a border.
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith("\ufffd") and not last:
            return ""
        new = text[len(self._given) :]
        if len(self._ids) - self._start > 16:
            self._start = len(self._ids) - 4
            self._given = self._tokenizer.decode(self._ids[self._start :])
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
