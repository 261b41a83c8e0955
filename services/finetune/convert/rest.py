"""What goes along with a model's weights: its config, its tokenizer, its chat template, and what its artifact says of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.finetune.convert.shards import INDEX
from services.finetune.prepare.certificate import META, carried
from services.finetune.store.artifacts import File, Manifest
from services.finetune.store.port import Store
from services.finetune.templates import load_template
from services.finetune.tokenizer import Tokenizer

CHAT_TEMPLATE = "chat_template.jinja"


def rest_of(source: Manifest) -> list[File]:
    """All files of a model but its weights."""
    return [f for f in source.files if f.path != INDEX and not f.path.endswith(".safetensors")]


def rest(store: Store, source: Manifest, config: Mapping[str, Any] | None, template: str = "") -> list[File]:
    """As rest_of, with another config.json if one is given, and with the chat template of a named template, which is what a
    model was tuned with; one of its own is in its files."""
    texts = {} if config is None else {"config.json": json.dumps(config, indent=2, sort_keys=True)}
    if template not in ("", "tokenizer"):
        texts[CHAT_TEMPLATE] = load_template(template, Tokenizer.from_artifact(store, source)).jinja()
    found = {f.path: f for f in rest_of(source)}
    for path, text in texts.items():
        blob = store.put_blob(text.encode())
        found[path] = File(path, blob.digest, blob.size)
    return list(found.values())


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json of weights in another dtype."""
    return {**{k: v for k, v in config.items() if k != "torch_dtype"}, "dtype": dtype}


def meta_of_tuned(base: Mapping[str, Any], tuned: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """What a whole model says of itself that is a base with what was `tuned` in it; `dtype` "" is the base's."""
    # A certificate of the base's own speaks of the template that the base was tuned with.
    meta = {k: v for k, v in base.items() if k != META} | carried(tuned)
    return {**meta, **{k: tuned[k] for k in ("template", "system", "base_name")}, "dtype": dtype or base["dtype"]}


def copy_rest(source: Manifest, folder: Path, out: Path) -> None:
    """The files of rest_of from `folder`, where they lie, to `out`."""
    for file in rest_of(source):
        (out / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file.path, out / file.path)


def write_template(folder: Path, out: Path, meta: Mapping[str, Any]) -> None:
    """The chat template in `out`, of the named template that a model in `folder` was tuned with; see rest."""
    if meta["template"] not in ("", "tokenizer"):
        (out / CHAT_TEMPLATE).write_text(load_template(meta["template"], Tokenizer.from_files(folder)).jinja())
