"""The tensors of a model's files under the names of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from services.finetune.convert.shards import Stored
from services.finetune.modules import FILE_LANGUAGE, in_memory, is_llava


def as_modules(tensors: Iterable[Stored], config: Mapping[str, Any]) -> list[Stored]:
    """The tensors of a model's files under their names in memory."""
    return [t.named(in_memory(t.name, config)) for t in tensors]


def in_files(tensors: Iterable[Stored], config: Mapping[str, Any]) -> Callable[[str], str]:
    """From names in memory to those in the files of a model with these tensors; a head that they lack is named as they
    are, and any other name stays."""
    own = {in_memory(t.name, config): t.name for t in tensors}
    if is_llava(config) and any(name.startswith(FILE_LANGUAGE) for name in own.values()):
        own.setdefault("lm_head.weight", f"{FILE_LANGUAGE}lm_head.weight")
    return lambda name: own.get(name, name)
