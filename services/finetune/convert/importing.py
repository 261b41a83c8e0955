"""IMPORT: a model from a folder, the hub, a GGUF file or an uploaded revision becomes safetensors with its tokenizer.

Nothing foreign is executed: configs that ask for code are refused, unless they are of a family that is known here as data
(families.py); of pickled weights a confined process says only where the tensors lie (pickles.py).
"""

from __future__ import annotations

import collections
import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.finetune.convert.encoders import is_encoder, write_encoder
from services.finetune.convert.families import Family, family_of, is_derived, native_config
from services.finetune.convert.fast_tokenizer import is_chatglm3, make_tokenizer
from services.finetune.convert.hub import download
from services.finetune.convert.native import write_native
from services.finetune.convert.pickles import read_tensors
from services.finetune.convert.rest import with_dtype
from services.finetune.convert.shards import (
    DTYPES,
    INDEX,
    NAMES,
    Stored,
    cast_bytes,
    plan,
    progress,
    read_folder,
    weight_files,
    write,
)
from services.finetune.convert.towers import PREPROCESSOR, check_llava, describe_tower, is_tower, write_tower
from services.finetune.errors import (
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from services.finetune.modules import LLAVA, in_memory, is_llava, text_config
from services.finetune.orders import ImportTask
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import Parent, load, materialise, publish_directory
from services.finetune.templates import TEMPLATES, check_name, load_template
from services.finetune.tokenizer import Tokenizer

KEPT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
        "merges.txt", "added_tokens.json", "preprocessor_config.json", "processor_config.json")  # fmt: skip
SHARD_BYTES = 2_000_000_000
_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "temperature", "top_p", "top_k", "repetition_penalty",
               "do_sample", "max_new_tokens", "chat_format")  # fmt: skip
# What trainers leave beside the weights: pickles too, but no model.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


def import_model(task: ImportTask, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    """Do an ImportTask; the digest of a "base" artifact, or of a "vision_tower" or "encoder".

    InvalidArgument (TEMPLATE_UNKNOWN, DTYPE_UNKNOWN, MODEL_UNSUPPORTED, PICKLE_REFUSED, CONFIG_MALFORMED,
    WEIGHTS_MALFORMED, WEIGHTS_INCOMPLETE, GGUF_MALFORMED), NotFound (MODEL_UNKNOWN, FILE_NOT_FOUND), Unavailable
    (HUB_UNREACHABLE), FailedPrecondition (REMOTE_CODE_REFUSED, MODEL_UNSUPPORTED, TOKENIZER_MISSING,
    TOKENIZER_INVALID, TEMPLATE_MISSING), Cancelled (STOPPED).
    """
    if task.template:
        check_name(task.template)
    if task.dtype and task.dtype not in DTYPES:
        raise InvalidArgument(f"unknown dtype {task.dtype!r}; use {', '.join(DTYPES)}", reason="DTYPE_UNKNOWN")
    source, parents = _fetch(task, attempt, stop, workdir)
    out = workdir / "model"
    out.mkdir()
    gguf, family = _find_gguf(source, task.file), None
    encodes = gguf is None and is_encoder(source)
    if gguf is None and is_tower(config := read_json(source / "config.json")):
        meta = _import_tower(task, config, source, out, attempt, stop)
        return publish_directory(attempt.store, "vision_tower", out, parents, meta, _storing(out, attempt, stop))
    if gguf is not None:
        from services.finetune.convert.gguf import convert_gguf

        attempt.emit("log", level="info", text=f"reading {gguf.name}")
        # Alone in a folder: transformers would read configs that lie beside it.
        alone = workdir / "gguf" / gguf.name
        alone.parent.mkdir()
        alone.symlink_to(gguf.resolve())
        convert_gguf(alone, out, task.dtype or "bfloat16", stop)
        total = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        attempt.emit("progress", done_bytes=total, total_bytes=total)
    else:
        family = _convert_folder(source, out, task.dtype, attempt, stop)
    if encodes:
        meta = write_encoder(source, out)
        return publish_directory(attempt.store, "encoder", out, parents, meta, _storing(out, attempt, stop))
    meta = describe(out, task.template, _family_template(family, source) if family else "")
    return publish_directory(attempt.store, "base", out, parents, meta, _storing(out, attempt, stop))


def _import_tower(
    task: ImportTask, config: dict[str, Any], source: Path, out: Path, attempt: Attempt, stop: threading.Event
) -> dict[str, Any]:
    """Write the vision tower of a folder; its meta."""
    if task.template:
        raise InvalidArgument("a vision model has no prompt template: leave it out", reason="TASK_INVALID")
    preprocessor = read_json(source / PREPROCESSOR)
    for name, data in (("config.json", config), (PREPROCESSOR, preprocessor)):
        _refuse_code(name, data)
    tensors = read_folder(source) if weight_files(source) else _pickled(source, attempt, stop)
    attempt.emit("log", level="info", text="a vision model, to assemble a LLaVA model with")
    write_tower(config, preprocessor, tensors, out, task.dtype, progress(attempt, stop))
    return describe_tower(read_json(out / "config.json"), read_folder(out))


def _storing(out: Path, attempt: Attempt, stop: threading.Event) -> Callable[[int, int], None]:
    """Reports how far storing is where that is the whole work, as of weights that stay what they are; obeys `stop`."""
    tell = progress(attempt, stop)
    if any(path.is_symlink() for path in out.iterdir()):
        return tell

    def obey(done: int, total: int) -> None:
        if stop.is_set():
            raise _stopped()

    return obey


# ---------------------------------------------------------------------------------------------- describing


def describe(folder: Path, template: str = "", otherwise: str = "") -> dict[str, Any]:
    """The meta of a model folder (docs/decisions/0003); `otherwise` is the template of a model that has none of its own
    and for which no other was asked. FailedPrecondition (MODEL_UNSUPPORTED, TOKENIZER_MISSING,
    TOKENIZER_INVALID, TEMPLATE_MISSING), InvalidArgument (CONFIG_MALFORMED, WEIGHTS_*)."""
    config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
    architecture = check_architecture(config)
    tokenizer = Tokenizer.from_files(folder)
    if template:
        load_template(template, tokenizer)
    tensors = read_folder(folder)
    text = text_config(config)
    tied = bool(text.get("tie_word_embeddings"))
    wanted = ("temperature", "top_p", "top_k", "repetition_penalty", "do_sample")
    return {
        "architecture": architecture,
        "template": template or ("tokenizer" if tokenizer.chat_template else otherwise),
        "system": "",
        "generation": {
            "eos_token_id": list(tokenizer.eos_ids),
            **{k: generation[k] for k in wanted if generation.get(k) is not None},
        },
        "dtype": _main_dtype(tensors),
        "context_length": int(text.get("max_position_embeddings") or 0),
        # A tied head is the embedding again, even where a file holds it twice.
        "parameters": sum(t.count for t in tensors if not (tied and in_memory(t.name, config) == "lm_head.weight")),
    }


def _family_template(family: Family, source: Path) -> str:
    """XTuner's template for a family's chat models."""
    name = family.template
    if family.name == "chatglm" and is_chatglm3(source, read_json(source / "tokenizer_config.json")):
        name = "chatglm3"
    return name if name in TEMPLATES else ""


def check_architecture(config: dict[str, Any]) -> str:
    """The architecture, if transformers knows it as a causal language model, or as LLaVA with one that it knows.
    FailedPrecondition (MODEL_UNSUPPORTED)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if is_llava(config):
        check_llava(config)
        check_architecture({k: v for k, v in text_config(config).items() if k != "architectures"})
        return LLAVA
    kind = str(config.get("model_type", ""))
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    architecture = str((config.get("architectures") or [known or ""])[0])
    if known is None or architecture != known or not architecture.endswith("ForCausalLM"):
        raise FailedPrecondition(
            f"model_type {kind!r} with {architecture or 'no architecture'} is no causal language model that transformers "
            "knows without code of its own",
            reason="MODEL_UNSUPPORTED",
        )
    if config.get("quantization_config"):
        raise FailedPrecondition(
            "the model's weights are quantised; import the model that it was made from", reason="MODEL_UNSUPPORTED"
        )
    return architecture


def _main_dtype(tensors: Sequence[Stored]) -> str:
    """The dtype of most numbers. FailedPrecondition (MODEL_UNSUPPORTED) if that is none we work in."""
    counts: collections.Counter[str] = collections.Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.count
    if not counts or (word := counts.most_common(1)[0][0]) not in NAMES:
        raise FailedPrecondition(
            f"the weights are {', '.join(counts) or 'missing'}; give them as one of {', '.join(DTYPES)}",
            reason="MODEL_UNSUPPORTED",
        )
    return NAMES[word]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no file. InvalidArgument (CONFIG_MALFORMED)."""
    try:
        data = json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path.name} is no JSON: {error}", reason="CONFIG_MALFORMED") from error
    if not isinstance(data, dict):
        raise InvalidArgument(f"{path.name} is no JSON object", reason="CONFIG_MALFORMED")
    return data


# ---------------------------------------------------------------------------------------------- fetching


def _fetch(task: ImportTask, attempt: Attempt, stop: threading.Event, workdir: Path) -> tuple[Path, list[Parent]]:
    if task.hub_id:
        return download(task.hub_id, task.file, attempt, stop, workdir / "hub"), []
    if task.source is not None:
        manifest = load(attempt.store, task.source.digest)
        folder = materialise(attempt.store, manifest, workdir / "source")
        return _only_folder(folder), [Parent("source", task.source.digest, task.source.name)]
    path = Path(task.local_path)
    if not path.exists():
        raise NotFound(f"{path} does not exist on the service's machine", reason="MODEL_UNKNOWN")
    return path, []


def _only_folder(folder: Path) -> Path:
    """An upload of a folder has all its files below that folder's name."""
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _find_gguf(source: Path, file: str) -> Path | None:
    if source.is_file():
        if source.suffix != ".gguf":
            raise InvalidArgument(f"{source.name} is neither a folder nor a .gguf file", reason="MODEL_UNSUPPORTED")
        return source
    found = sorted(source.glob("*.gguf"))
    if file:
        found = [p for p in found if p.name == file]
        if not found:
            raise NotFound(f"the source has no .gguf file {file!r}", reason="FILE_NOT_FOUND")
    if (source / "config.json").exists() and not file:
        return None
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise InvalidArgument(
            f"the source has no config.json, and its .gguf files are {names}: name one", reason="MODEL_UNSUPPORTED"
        )
    return found[0]


# ---------------------------------------------------------------------------------------------- converting


def _convert_folder(source: Path, out: Path, dtype: str, attempt: Attempt, stop: threading.Event) -> Family | None:
    """Weights, config and tokenizer of a folder; the family, if it is one that came with code of its own."""
    for name in KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    original = read_json(out / "config.json")
    family = family_of(original)
    configs = {n: read_json(out / n) for n in ("config.json", "tokenizer_config.json", "generation_config.json")}
    if family is None:
        for name, config in configs.items():
            _refuse_code(name, config)
    else:
        attempt.emit("log", level="info", text=f"a model of {family.name}, made native; its own code is left out")
        _write_native_configs(family, configs, out)
    config = read_json(out / "config.json")
    if not is_encoder(source):
        check_architecture(config)
    safe = bool(weight_files(source))
    tensors = read_folder(source) if safe else _pickled(source, attempt, stop)
    if family is not None:
        write_native(family, config, tensors, out, dtype, SHARD_BYTES, progress(attempt, stop))
        _say_dtype(out, dtype)
    elif not safe or (dtype and any(t.cast(dtype).dtype != t.dtype for t in tensors)):
        _rewrite(tensors, out, dtype, attempt, stop)
    else:
        # Links: the store reads through them, and gigabytes are copied once, not twice.
        for path in weight_files(source):
            (out / path.name).symlink_to(path.resolve())
        if (source / INDEX).is_file():
            shutil.copyfile(source / INDEX, out / INDEX)
    _tokenizer(source, out, family, configs["tokenizer_config.json"])
    return family


def _refuse_code(name: str, config: Any) -> None:
    """`auto_map` names classes in Python files of the model's own, at any depth of a config."""
    left = [config]
    while left:
        data = left.pop()
        if isinstance(data, dict) and "auto_map" in data:
            raise FailedPrecondition(
                f"{name} has auto_map: the model wants to run code of its own, which is never done here; use a model that "
                "transformers knows",
                reason="REMOTE_CODE_REFUSED",
                metadata={"file": name},
            )
        left += data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()


def _write_native_configs(family: Family, configs: Mapping[str, dict[str, Any]], out: Path) -> None:
    """The native config, and of the others what is no code: their known keys are copied, auto_map is not one."""
    native = native_config(family, configs["config.json"])
    generation = {k: v for k, v in configs["generation_config.json"].items() if k in _GENERATION}
    generation.setdefault("eos_token_id", native.get("eos_token_id"))
    (out / "config.json").write_text(json.dumps(native, indent=2, sort_keys=True))
    kept = {k: v for k, v in generation.items() if v is not None}
    (out / "generation_config.json").write_text(json.dumps(kept, indent=2, sort_keys=True))
    (out / "tokenizer_config.json").unlink(missing_ok=True)


def _rewrite(tensors: Sequence[Stored], out: Path, dtype: str, attempt: Attempt, stop: threading.Event) -> None:
    stored = {t.name: t for t in tensors if not is_derived(t.name)}
    targets = [t.cast(dtype) for t in stored.values()]
    tell, done = progress(attempt, stop), 0
    total = sum(t.nbytes for t in targets)

    def count(tensor: Stored) -> None:
        nonlocal done
        done += tensor.nbytes
        tell(done, total)

    write(out, plan(targets, SHARD_BYTES), lambda t: cast_bytes(stored[t.name], dtype), count)
    _say_dtype(out, dtype)


def _say_dtype(out: Path, dtype: str) -> None:
    if dtype:
        config = with_dtype(read_json(out / "config.json"), dtype)
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def _pickled(source: Path, attempt: Attempt, stop: threading.Event) -> list[Stored]:
    """The tensors of a folder's pickled weights. InvalidArgument (MODEL_UNSUPPORTED, PICKLE_REFUSED,
    WEIGHTS_INCOMPLETE)."""
    every = [p for p in sorted(source.iterdir()) if p.suffix in (".bin", ".pth", ".pt")]
    files = [p for p in every if p.name.startswith("pytorch_model")]
    files = files or [p for p in every if not p.name.startswith(_NO_WEIGHTS)]
    if not files:
        raise InvalidArgument(
            f"{source.name} has no weights: neither *.safetensors nor *.bin, *.pth", reason="MODEL_UNSUPPORTED"
        )
    found: dict[str, Stored] = {}
    for path in files:
        attempt.emit(
            "log", level="warning", text=f"{path.name} is a pickle: a confined process says where its tensors are"
        )
        for name, tensor in read_tensors(path, stop).items():
            if name in found:
                raise _incomplete(f"{name} is in {found[name].file.name} and in {path.name}")
            found[name] = tensor
    index = read_json(source / "pytorch_model.bin.index.json").get("weight_map")
    gone = sorted(set(index) - set(found)) if isinstance(index, dict) else []
    if gone:
        raise _incomplete(f"the index names {gone[0]}, which no file holds")
    return list(found.values())


def _incomplete(why: str) -> InvalidArgument:
    return InvalidArgument(f"{why}; fetch all of the model's files", reason="WEIGHTS_INCOMPLETE")


def _tokenizer(source: Path, out: Path, family: Family | None, config: dict[str, Any]) -> None:
    """tokenizer.json, if the source has none. FailedPrecondition (TOKENIZER_MISSING)."""
    if (source / "tokenizer.json").is_file():
        if family is not None:
            kept = {k: v for k, v in config.items() if k not in ("auto_map", "tokenizer_class")}
            kept["tokenizer_class"] = "PreTrainedTokenizerFast"
            (out / "tokenizer_config.json").write_text(json.dumps(kept, ensure_ascii=False, indent=2, sort_keys=True))
        return
    if make_tokenizer(source, out, family, config):
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(out, use_fast=True, trust_remote_code=False, local_files_only=True)
        tokenizer.save_pretrained(out)
    except Exception as error:  # converters of old tokenizers raise whatever the missing file leads to
        raise FailedPrecondition(
            f"no tokenizer can be made of the source's files: {(str(error).splitlines() or ['unknown'])[0]}",
            reason="TOKENIZER_MISSING",
        ) from error
    if not (out / "tokenizer.json").exists():
        raise FailedPrecondition("the tokenizer has no fast form; add its tokenizer.json", reason="TOKENIZER_MISSING")


def _stopped() -> Cancelled:
    return Cancelled("stopped before anything was kept", reason="STOPPED")
