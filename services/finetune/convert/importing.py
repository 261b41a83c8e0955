"""IMPORT: a model from a folder, the hub, a GGUF file or an uploaded revision becomes safetensors with its tokenizer.

Nothing foreign is executed: configs that ask for code are refused, and pickled weights are read in a process of their
own that has no environment and may only build tensors.
"""

from __future__ import annotations

import collections
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.finetune.config import ImportTask
from services.finetune.convert.hub import download
from services.finetune.convert.shards import (
    DTYPES,
    INDEX,
    NAMES,
    Stored,
    cast_bytes,
    plan,
    progress,
    read_file_header,
    read_folder,
    weight_files,
    write,
)
from services.finetune.errors import (
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import Parent, load, materialise, publish_directory
from services.finetune.templates import check_name, load_template
from services.finetune.tokenizer import Tokenizer

KEPT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
        "merges.txt", "added_tokens.json")  # fmt: skip
SHARD_BYTES = 2_000_000_000
# What trainers leave beside the weights: pickles too, but no model.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")

# Run in a process of its own: argv is a pickled file and the safetensors file to write.
_UNPICKLE = """
import sys, torch
from safetensors.torch import save_file
try:
    tensors = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
except MemoryError:
    raise
except Exception as error:
    sys.exit("it is no plain file of tensors: " + (str(error).splitlines() or ["unreadable"])[0])
if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
    tensors = tensors["state_dict"]
if not isinstance(tensors, dict) or not all(isinstance(k, str) for k in tensors):
    sys.exit("it is no table of tensors by name")
odd = [k for k, v in tensors.items() if not isinstance(v, torch.Tensor) or v.layout != torch.strided or v.is_quantized]
if odd:
    sys.exit("it holds more than plain tensors: " + ", ".join(odd[:3]))
save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, sys.argv[2], metadata={"format": "pt"})
"""


def import_model(task: ImportTask, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    """Do an ImportTask; the digest of a "base" artifact.

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
    gguf = _find_gguf(source, task.file)
    if gguf is not None:
        from services.finetune.convert.gguf import convert_gguf

        attempt.emit("log", level="info", text=f"reading {gguf.name}")
        # Alone in a folder: transformers would read configs that lie beside it.
        alone = workdir / "gguf" / gguf.name
        alone.parent.mkdir()
        alone.symlink_to(gguf.resolve())
        convert_gguf(alone, out, task.dtype or "bfloat16", stop)
    else:
        _convert_folder(source, out, task.dtype, attempt, stop, workdir)
    meta = describe(out, task.template)
    if stop.is_set():
        raise _stopped()
    digest = publish_directory(attempt.store, "base", out, parents, meta)
    total = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    attempt.emit("progress", done_bytes=total, total_bytes=total)
    return digest


# ---------------------------------------------------------------------------------------------- describing


def describe(folder: Path, template: str = "") -> dict[str, Any]:
    """The meta of a model folder (docs/decisions/0003). FailedPrecondition (MODEL_UNSUPPORTED, TOKENIZER_MISSING,
    TOKENIZER_INVALID, TEMPLATE_MISSING), InvalidArgument (CONFIG_MALFORMED, WEIGHTS_*)."""
    config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
    architecture = check_architecture(config)
    tokenizer = Tokenizer.from_files(folder)
    if template:
        load_template(template, tokenizer)
    tensors = read_folder(folder)
    tied = bool(config.get("tie_word_embeddings"))
    wanted = ("temperature", "top_p", "top_k", "repetition_penalty", "do_sample")
    return {
        "architecture": architecture,
        "template": template or ("tokenizer" if tokenizer.chat_template else ""),
        "system": "",
        "generation": {
            "eos_token_id": list(tokenizer.eos_ids),
            **{k: generation[k] for k in wanted if generation.get(k) is not None},
        },
        "dtype": _main_dtype(tensors),
        "context_length": int(config.get("max_position_embeddings") or 0),
        # A tied head is the embedding again, even where a file holds it twice.
        "parameters": sum(t.count for t in tensors if not (tied and t.name == "lm_head.weight")),
    }


def check_architecture(config: dict[str, Any]) -> str:
    """The architecture, if transformers knows it as a causal language model. FailedPrecondition (MODEL_UNSUPPORTED)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
    except ValueError as error:
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


def _convert_folder(
    source: Path, out: Path, dtype: str, attempt: Attempt, stop: threading.Event, workdir: Path
) -> None:
    for name in KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        _refuse_code(name, read_json(out / name))
    check_architecture(read_json(out / "config.json"))
    if not weight_files(source):
        plain = workdir / "unpickled"
        plain.mkdir()
        _unpickle(source, plain, attempt, stop)
        source = plain
    tensors = read_folder(source)
    if dtype and any(t.cast(dtype).dtype != t.dtype for t in tensors):
        _cast(tensors, out, dtype, attempt, stop)
    else:
        # Links: the store reads through them, and gigabytes are copied once, not twice.
        for path in weight_files(source):
            (out / path.name).symlink_to(path.resolve())
        if (source / INDEX).is_file():
            shutil.copyfile(source / INDEX, out / INDEX)
    if not (out / "tokenizer.json").exists():
        _fast_tokenizer(out)


def _refuse_code(name: str, data: Any) -> None:
    """`auto_map` names classes in Python files of the model's own, at any depth of a config."""
    if isinstance(data, dict):
        if "auto_map" in data:
            raise FailedPrecondition(
                f"{name} has auto_map: the model wants to run code of its own, which is never done here; use a model that "
                "transformers knows",
                reason="REMOTE_CODE_REFUSED",
                metadata={"file": name},
            )
        for value in data.values():
            _refuse_code(name, value)


def _cast(tensors: Sequence[Stored], out: Path, dtype: str, attempt: Attempt, stop: threading.Event) -> None:
    stored = {t.name: t for t in tensors}
    tell, done = progress(attempt, stop), 0
    total = sum(t.cast(dtype).nbytes for t in tensors)

    def count(tensor: Stored) -> None:
        nonlocal done
        done += tensor.nbytes
        tell(done, total)

    shards = plan((t.cast(dtype) for t in tensors), SHARD_BYTES)
    write(out, shards, lambda t: cast_bytes(stored[t.name], dtype), count)
    config = read_json(out / "config.json")
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2, sort_keys=True))


def _unpickle(source: Path, plain: Path, attempt: Attempt, stop: threading.Event) -> None:
    every = [p for p in sorted(source.iterdir()) if p.suffix in (".bin", ".pth", ".pt")]
    files = [p for p in every if p.name.startswith("pytorch_model")]
    files = files or [p for p in every if not p.name.startswith(_NO_WEIGHTS)]
    if not files:
        raise InvalidArgument(
            f"{source.name} has no weights: neither *.safetensors nor *.bin, *.pth", reason="MODEL_UNSUPPORTED"
        )
    names: dict[str, str] = {}
    for n, path in enumerate(files, 1):
        attempt.emit("log", level="warning", text=f"{path.name} is a pickle: reading tensors only, in its own process")
        many = len(files) > 1
        target = plain / (f"model-{n:05d}-of-{len(files):05d}.safetensors" if many else "model.safetensors")
        _unpickle_one(path, target, stop)
        names.update({t.name: target.name for t in read_file_header(target)})
    if len(files) > 1:
        (plain / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}, indent=1, sort_keys=True))


def _unpickle_one(path: Path, target: Path, stop: threading.Event) -> None:
    command = [sys.executable, "-I", "-c", _UNPICKLE, str(path.resolve()), str(target)]
    with subprocess.Popen(command, env={}, cwd=target.parent, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as child:  # fmt: skip
        while True:
            try:
                _, said = child.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if stop.is_set():
                    child.kill()
                    raise _stopped() from None
    if child.returncode < 0 or "MemoryError" in said:
        raise ResourceExhausted(f"{path.name} does not fit into memory", reason="OUT_OF_MEMORY")
    if child.returncode != 0:
        why = (said.strip().splitlines() or ["unreadable"])[-1][:300]
        raise InvalidArgument(
            f"{path.name} is refused: {why}; give the weights as safetensors",
            reason="PICKLE_REFUSED",
            metadata={"file": path.name},
        )


def _fast_tokenizer(out: Path) -> None:
    """Make tokenizer.json of an older tokenizer's files. FailedPrecondition (TOKENIZER_MISSING)."""
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
