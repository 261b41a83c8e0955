"""ASSEMBLE: a language model, a vision tower and a fresh projector become one LLaVA model (Liu et al. 2023), streamed from
store to store (docs/decisions/0065).

The result is transformers' LlavaForConditionalGeneration under the file names that all its versions, and vLLM, read. The
projector lies in a file of its own, so that a model in which it alone is other shares all else.
"""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.finetune.config import to_json
from services.finetune.convert.image_token import IMAGE_TOKEN, add_image_token
from services.finetune.convert.rest import rest_of
from services.finetune.convert.shards import DTYPES, NAMES, Stored, order, plan, progress, shard_names
from services.finetune.convert.stream import (
    Piece,
    Shard,
    Writer,
    borrow_rows,
    cast,
    check_layout,
    computed,
    read_model,
    slices,
)
from services.finetune.convert.towers import CLIP, PREFIX, PREPROCESSOR, check_sizes
from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.finetune.modules import FILE_LANGUAGE, FILE_PROJECTOR, FILE_TOWER, LLAVA
from services.finetune.orders import AssembleTask
from services.finetune.prepare.certificate import META
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import File, Manifest, Parent, load, publish, read_file
from services.finetune.store.port import Store

REVISION = 1
"""Of the bytes that this code makes: files of an earlier attempt with another are made again."""
ROWS = 64
"""An embedding that has to grow gets a multiple of so many rows, which matrix units work best with."""
_ROW_BYTES = 8 << 20


def assemble(task: AssembleTask, attempt: Attempt, stop: threading.Event) -> str:
    """Do an AssembleTask; the digest of a "base" artifact.

    FailedPrecondition (MODEL_NOT_WHOLE, MODEL_NOT_TOWER, MODEL_UNSUPPORTED), InvalidArgument (DTYPE_UNKNOWN,
    SHARD_SIZE_INVALID, FEATURE_LAYER_INVALID), Cancelled (STOPPED).
    """
    check_layout(task.dtype, task.max_shard_size_bytes)
    store = attempt.store
    language, tower = _check(task, store)
    parts = _Parts(store, language, tower, task)
    shards = parts.shards(task.max_shard_size_bytes)
    mark = json.dumps([REVISION, to_json(task), torch.__version__], sort_keys=True)
    files = Writer(attempt, mark, progress(attempt, stop)).write(shards, parts.pieces)
    files += _rest(store, language, parts.texts(task))
    parents = (
        Parent("language_model", task.language_model.digest, task.language_model.name),
        Parent("vision_tower", task.vision_tower.digest, task.vision_tower.name),
    )
    # Certificates and reports speak of another tokenizer and other weights.
    meta = {k: v for k, v in language.meta.items() if k not in (META, "report")}
    count = sum(t.count for shard in shards for t in shard.tensors)
    meta |= {"architecture": LLAVA, "dtype": parts.dtype, "parameters": count}
    return publish(store, Manifest("base", tuple(sorted(files, key=lambda f: f.path)), parents, meta))


def _check(task: AssembleTask, store: Store) -> tuple[Manifest, Manifest]:
    language, tower = load(store, task.language_model.digest), load(store, task.vision_tower.digest)
    if language.kind not in ("base", "merged") or not language.meta["architecture"].endswith("ForCausalLM"):
        raise FailedPrecondition(
            f"{task.language_model.name} is no whole language model; name a BASE or MERGED one",
            reason="MODEL_NOT_WHOLE",
        )
    if tower.kind != "vision_tower":
        raise FailedPrecondition(
            f"{task.vision_tower.name} is of kind {tower.kind.upper()}; import a CLIP, SigLIP or DINOv2 model",
            reason="MODEL_NOT_TOWER",
        )
    return language, tower


@dataclass(frozen=True, slots=True)
class _Grown:
    """An embedding, or a head, with rows more."""

    source: Stored
    rows: int


class _Parts:
    """The model's tensors by their names in its files, and where each comes from."""

    def __init__(self, store: Store, language: Manifest, tower: Manifest, task: AssembleTask) -> None:
        self._store = store
        self.dtype = task.dtype or language.meta["dtype"]
        self._text, self._vision = (_json(store, m, "config.json") for m in (language, tower))
        self._preprocessor = _json(store, tower, PREPROCESSOR)
        check_sizes(self._vision, self._preprocessor)
        layers = self._vision["num_hidden_layers"]
        if not -layers - 1 <= task.feature_layer <= layers:
            raise InvalidArgument(
                f"the tower has {layers} layers, and no layer {task.feature_layer}", reason="FEATURE_LAYER_INVALID"
            )
        found = {
            f.path: read_file(store, language, f.path) for f in language.files if "token" in f.path and _is_json(f)
        }
        self.token, self._tokenizer = add_image_token(found)
        own = _language(read_model(store, language), bool(self._text.get("tie_word_embeddings")))
        self._grown = self._grow(own)
        self.tensors = {
            "language": [self._target(FILE_LANGUAGE + t.name, t) for t in own],
            "tower": [self._target(FILE_TOWER + t.name.removeprefix(PREFIX), t) for t in read_model(store, tower)],
        }
        self._projector = _Projector(self._vision["hidden_size"], self._text["hidden_size"], task.seed)

    def _target(self, name: str, source: Stored) -> tuple[Stored, Stored]:
        """(the tensor as it will be, its source)."""
        made = source.cast(self.dtype).named(name)
        if name in self._grown:
            rows = self._grown[name].rows
            shape = (rows, *source.shape[1:])
            made = Stored(name, made.dtype, shape, 0, made.nbytes // source.shape[0] * rows)
        return made, source

    def _grow(self, own: Iterable[Stored]) -> dict[str, _Grown]:
        """Embedding and head, if the image's token is beyond their rows."""
        rows = int(self._text["vocab_size"])
        if self.token < rows:
            return {}
        self._text["vocab_size"] = grown = -(-(self.token + 1) // ROWS) * ROWS
        names = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
        return {FILE_LANGUAGE + t.name: _Grown(t, grown) for t in own if t.name in names}

    def shards(self, limit: int) -> list[Shard]:
        """The files: the language model's, the tower's, and last the projector's."""
        self._sources = dict[str, Stored]()
        planned: list[list[Stored]] = []
        for part in self.tensors.values():
            self._sources |= {made.name: source for made, source in part}
            planned += plan((made for made, _ in part), limit)
        planned.append(self._projector.tensors(self.dtype))
        names = shard_names(len(planned))
        return [Shard(name, tuple(order(held))) for name, held in zip(names, planned, strict=True)]

    def pieces(self, tensor: Stored) -> Iterable[Piece]:
        if tensor.name.startswith(FILE_PROJECTOR):
            return computed(tensor, self._projector.rows(tensor.name))
        if tensor.name in self._grown:
            return computed(tensor, _grown_rows(self._store, self._grown[tensor.name]))
        return cast(self._store, self._sources[tensor.name], tensor)

    def texts(self, task: AssembleTask) -> Mapping[str, bytes]:
        """The small files that are not the language model's own."""
        clip = self._vision["model_type"] == CLIP
        strategy = "default" if clip else "full"  # SigLIP has no class token to leave out
        left_out = ("transformers_version", "dtype", "torch_dtype", "_name_or_path")
        text, vision = ({k: v for k, v in c.items() if k not in left_out} for c in (self._text, self._vision))
        tokens = (vision["image_size"] // vision["patch_size"]) ** 2
        config = {
            "architectures": [LLAVA],
            "model_type": "llava",
            "dtype": self.dtype,
            "text_config": text,
            "vision_config": vision,
            "image_token_index": self.token,
            "image_seq_length": tokens,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": task.feature_layer,
            "vision_feature_select_strategy": strategy,
            "tie_word_embeddings": bool(text.get("tie_word_embeddings")),
        }
        processor = {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_TOKEN,
            "patch_size": vision["patch_size"],
            "vision_feature_select_strategy": strategy,
            "num_additional_image_tokens": int(clip),
        }
        preprocessor = {**self._preprocessor, "processor_class": "LlavaProcessor"}
        if task.pad_to_square:
            preprocessor |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
            preprocessor |= {"do_center_crop": preprocessor.get("do_center_crop", clip)}
        made = {"config.json": config, "processor_config.json": processor, PREPROCESSOR: preprocessor}
        texts = {path: json.dumps(data, indent=2, sort_keys=True).encode() for path, data in made.items()}
        return {**self._tokenizer, **texts}


class _Projector:
    """Linear, GELU, Linear, from the tower's width to the language model's, as torch begins them: uniform within
    1 / sqrt(inputs), weights and biases. The numbers are the same on every machine."""

    def __init__(self, into: int, out: int, seed: int) -> None:
        self._shapes = {"linear_1": (out, into), "linear_2": (out, out)}
        self._seed = seed

    def tensors(self, dtype: str) -> list[Stored]:
        word, width = DTYPES[dtype]
        shapes = {f"{m}.{leaf}": s[: 2 if leaf == "weight" else 1] for m, s in self._shapes.items() for leaf in _LEAVES}
        return [Stored(FILE_PROJECTOR + n, word, s, 0, math.prod(s) * width) for n, s in shapes.items()]

    def rows(self, name: str) -> Any:
        value = functools.cache(lambda: self._value(name.removeprefix(FILE_PROJECTOR)))
        return lambda start, stop: [value()[start:stop]]

    def _value(self, name: str) -> Tensor:
        module, _, leaf = name.partition(".")
        out, into = self._shapes[module]
        place = list(self._shapes).index(module) * len(_LEAVES) + _LEAVES.index(leaf)
        generator = torch.Generator().manual_seed(self._seed * 4 + place)
        shape = (out, into) if leaf == "weight" else (out,)
        return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(into)


_LEAVES = ("weight", "bias")


def _language(tensors: Iterable[Stored], tied: bool) -> list[Stored]:
    """A language model's tensors, without a head that is its embedding again. FailedPrecondition (MODEL_UNSUPPORTED)."""
    own = [t for t in tensors if not (tied and t.name == "lm_head.weight")]
    odd = next((t.name for t in own if not t.name.startswith(("model.", "lm_head.")) or t.dtype not in NAMES), "")
    if odd or not any(t.name == "model.embed_tokens.weight" for t in own):
        raise FailedPrecondition(
            f"LLaVA needs a language model whose tensors are named as a Llama's: {odd or 'no model.embed_tokens.weight'}",
            reason="MODEL_UNSUPPORTED",
        )
    return own


def _grown_rows(store: Store, grown: _Grown) -> Any:
    """The rows of an embedding that has grown: new ones are the mean of the old, so that the model neither sees nor says
    anything new."""
    source, count = grown.source, grown.source.shape[0]

    def all_rows(start: int, stop: int) -> Iterator[Tensor]:
        if start < count:
            yield borrow_rows(store, source, start, min(stop, count))
        if stop > count:
            new = stop - max(start, count)
            yield mean().expand(new, *source.shape[1:])

    @functools.cache
    def mean() -> Tensor:
        total = torch.zeros(source.shape[1:], dtype=torch.float64)
        for start, stop in slices(count, source.nbytes // count, _ROW_BYTES):
            total += borrow_rows(store, source, start, stop).double().sum(0)
        return total / count

    return all_rows


def _rest(store: Store, language: Manifest, texts: Mapping[str, bytes]) -> list[File]:
    found = {f.path: f for f in rest_of(language)}
    for path, text in texts.items():
        blob = store.put_blob(text)
        found[path] = File(path, blob.digest, blob.size)
    return list(found.values())


def _json(store: Store, manifest: Manifest, path: str) -> dict[str, Any]:
    return dict(json.loads(read_file(store, manifest, path)))


def _is_json(file: File) -> bool:
    return file.path.endswith(".json")
