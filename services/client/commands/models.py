"""model, convert."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from quartet.conversion.v1 import conversion_pb2
from quartet.training.v1 import training_pb2

from services.client.client import Client, Progress
from services.client.commands import connect, readable, short_name
from services.client.commands.jobs import follow
from services.client.download import download_model
from services.client.retry import pages
from services.client.show import bar, out, plain, table
from services.finetune.errors import InvalidArgument, NotFound, PermissionDenied
from services.finetune.formats import Reading

SHOWN = (
    "name", "display_name", "kind", "digest", "architecture", "parameter_count", "dtype", "context_length", "size_bytes",
    "template", "system", "generation", "base_model", "source", "job", "labels", "report", "create_time", "etag",
)  # fmt: skip
"""What `model get` tells of a model before its certificate, parents and files."""


def import_model(a: Namespace) -> int:
    with connect(a) as client, bar("uploading", a.json) as told:
        task = conversion_pb2.ImportTask(dtype=a.dtype, template=a.template)
        job = start_import(client, a.source, a.name or import_name(a.source), task, told)
    with connect(a) as client:
        return follow(client, job.name, a.json)


def start_import(
    client: Client, source: str, target: str, task: conversion_pb2.ImportTask, told: Progress
) -> conversion_pb2.ConversionJob:
    """Queue an import of a file, a folder or a hub id. What is here is read by the service where it can see it, else
    brought; an absolute path that is not here may be on the service's machine. NotFound (MODEL_UNKNOWN)."""
    path = Path(source).expanduser()
    if not path.exists() and not path.is_absolute():
        if source.startswith(".") or source.endswith(".gguf") or source.count("/") != 1:
            raise NotFound(f"{source} is no file or folder here; a hub id is OWNER/NAME", reason="MODEL_UNKNOWN")
        task.hub_id = source
        return client.convert(target, import_model=task)
    if client.is_local("conversion") or not path.exists():
        task.local_path = str(path.resolve())
        try:
            return client.convert(target, import_model=task)
        except (NotFound, PermissionDenied) as error:
            if error.reason not in ("LOCAL_PATH_FORBIDDEN", "MODEL_NOT_FOUND"):
                raise
            if not path.exists():
                why = f"{source} is no file or folder here, and the service says: {error.message}"
                raise NotFound(why, reason="MODEL_UNKNOWN") from error
            # On loopback, yet it may not or cannot see our files, as in a container: bring them.
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    if not files:
        raise NotFound(f"{source} is an empty folder", reason="MODEL_UNKNOWN")
    dataset = f"import-{target.rpartition('/')[2]}"[:63].rstrip("-")
    task.revision = client.upload_dataset(dataset, files, Reading("files"), told).name
    return client.convert(target, import_model=task)


def import_name(source: str) -> str:
    """A model's id by where it comes from: a hub id's or path's last part, without .gguf and @revision."""
    last = source.rstrip("/").rpartition("/")[2]
    name = short_name(last.partition("@")[0].removesuffix(".gguf"))
    if not name:
        raise InvalidArgument(f"{source} makes no name; give one with --name", reason="NAME_MALFORMED")
    return name


def list_all(a: Namespace) -> None:
    with connect(a) as client:
        request = conversion_pb2.ListModelsRequest(parent=client.parent)
        models = list(pages(client.conversion.ListModels, request, "models"))
    if a.json:
        out({"models": [plain(m) for m in models]})
        return
    kinds = conversion_pb2.Model.Kind
    rows = [(m.name, kinds.Name(m.kind), f"{m.size_bytes / 1e6:.0f}", m.template, m.architecture) for m in models]
    table(["model", "kind", "MB", "template", "architecture"], rows)


def get(a: Namespace) -> None:
    with connect(a) as client:
        model = client.model(a.model)
    if a.json:
        out(plain(model))
        return
    about = plain(model)
    shown = {k: about[k] for k in SHOWN if about.get(k)}
    if model.HasField("certificate"):
        c = model.certificate
        shown["certificate"] = (
            f"{c.digest}\n  tokenizer {c.tokenizer_digest}\n  template {c.template} {c.template_digest}"
        )
    for title, value in shown.items():
        print(f"{title:16} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    if model.parents:
        table(["made from", "name", "digest"], [(p.role, p.name, p.digest) for p in model.parents])
    table(["file", "bytes", "digest"], [(f.path, f.size_bytes, f.digest) for f in model.files])


def delete(a: Namespace) -> None:
    with connect(a) as client:
        name = client.name("models", a.model)
        client.conversion.DeleteModel(conversion_pb2.DeleteModelRequest(name=name, force=a.force))
    out({"deleted": name}) if a.json else print(f"{name} is forgotten")


def download(a: Namespace) -> None:
    folder = Path(a.directory)
    with connect(a) as client, bar("downloading", a.json) as told:
        model = client.model(a.model)
        download_model(client, model, folder, told)
    out({"directory": str(folder), "model": plain(model)}) if a.json else print(f"{model.name} is in {folder}")


def convert_adapter(a: Namespace) -> int:
    task = conversion_pb2.AdapterTask(dtype="float32" if a.fp32 else "bfloat16", lora_alpha=a.lora_alpha)
    if a.max_shard_size:
        task.max_shard_size_bytes = read_size(a.max_shard_size)
    path = Path(a.checkpoint).expanduser()
    foreign = path.suffix in (".pth", ".pt", ".bin") or path.exists()
    with connect(a) as client, bar("uploading", a.json) as told:
        if foreign:
            _bring_checkpoint(client, a, path, task, told)
        elif a.config or a.base:
            raise InvalidArgument(
                "a checkpoint of a job knows its config and its base: leave them out", reason="TASK_INVALID"
            )
        else:
            known = "/checkpoints/" in a.checkpoint
            task.checkpoint = a.checkpoint if known else _last_checkpoint(client, a.checkpoint)
        job = client.convert(a.target, adapter=task)
    with connect(a) as client:
        return follow(client, job.name, a.json)


def _bring_checkpoint(
    client: Client, a: Namespace, path: Path, task: conversion_pb2.AdapterTask, told: Progress
) -> None:
    """Upload another trainer's checkpoint and its config as a dataset revision, and say so in `task`."""
    if not a.base:
        raise InvalidArgument(f"name the model that {path.name} was trained on with --base", reason="TASK_INVALID")
    task.base = client.name("models", a.base)
    files = [] if not a.config.endswith(".py") else [readable(a.config)]
    if a.config and not files and not task.lora_alpha:
        task.lora_alpha = _recipe_alpha(client, a.config)
    task.revision = upload_checkpoint(client, path, client.name("models", a.target), files, told)


def upload_checkpoint(
    client: Client, path: Path, target: str, beside: Sequence[Path] = (), told: Progress = lambda done, total: None
) -> str:
    """The revision that another trainer's checkpoint becomes: a file, DeepSpeed's folder, or one of adapters' folders.
    NotFound (CHECKPOINT_NOT_FOUND)."""
    inside = sorted(path.iterdir()) if path.is_dir() else []
    if path.is_dir() and not inside:
        raise NotFound(f"{path} is an empty folder", reason="CHECKPOINT_NOT_FOUND")
    # Folders in it have names that tell what they hold; without any the files are enough.
    files = [path] if any(p.is_dir() for p in inside) else inside or [readable(str(path))]
    dataset = f"checkpoint-{target.rpartition('/')[2]}"[:63].rstrip("-")
    return client.upload_dataset(dataset, [*files, *beside], Reading("files"), told).name


def _recipe_alpha(client: Client, recipe: str) -> float:
    name = recipe if recipe.startswith("recipes/") else f"recipes/{recipe}"
    found = client.training.GetRecipe(training_pb2.GetRecipeRequest(name=name))
    return float(plain(found)["config"]["lora"]["alpha"])


def _last_checkpoint(client: Client, job: str) -> str:
    name = client.name("trainingJobs", job)
    request = training_pb2.ListCheckpointsRequest(parent=name, page_size=1, order_by="step desc")
    found = client.training.ListCheckpoints(request).checkpoints
    if not found:
        raise NotFound(f"{name} has no checkpoint", reason="CHECKPOINT_NOT_FOUND")
    return str(found[0].name)


def convert_assemble(a: Namespace) -> int:
    with connect(a) as client:
        task = conversion_pb2.AssembleTask(
            language_model=client.name("models", a.language_model),
            vision_tower=client.name("models", a.vision_tower),
            seed=a.seed,
            dtype=a.dtype,
            feature_layer=a.visual_select_layer,
            pad_to_square=a.pad_image_to_square,
        )
        return follow(client, client.convert(a.name, assemble=task).name, a.json)


def convert_merge(a: Namespace) -> int:
    size = read_size(a.max_shard_size) if a.max_shard_size else 0
    with connect(a) as client:
        task = conversion_pb2.MergeTask(
            adapter=client.name("models", a.adapter),
            base=_base_named(client, a.base, a.json),
            dtype=a.dtype,
            max_shard_size_bytes=size,
            base_dtype=a.base_dtype,
            report=a.report,
        )
        return follow(client, client.convert(a.target, merge=task).name, a.json)


def _base_named(client: Client, text: str, quiet: bool) -> str:
    """A base by its name, or by a path here, written so that it can be no name: what `train` makes of the same folder."""
    if not text.startswith((".", "/", "~")):
        return client.name("models", text)
    from services.client.sources import bring_base  # which stands on this module

    path = Path(text).expanduser()
    if not path.exists():
        raise NotFound(f"{text} is no file or folder here", reason="FILE_NOT_FOUND")
    with bar("uploading", quiet) as told:
        return bring_base(client, path, lambda said: print(said, file=sys.stderr), told)


def convert_split(a: Namespace) -> int:
    size = read_size(a.max_shard_size)
    with connect(a) as client:
        task = conversion_pb2.ReshardTask(
            model=client.name("models", a.model), dtype=a.dtype, max_shard_size_bytes=size
        )
        return follow(client, client.convert(a.target, reshard=task).name, a.json)


def convert_export(a: Namespace) -> int:
    with connect(a) as client:
        task = conversion_pb2.ExportTask(
            model=client.name("models", a.model),
            form=a.form,
            gguf_type=a.type,
            destination=a.to,
            public=a.public,
        )
        return follow(client, client.convert(a.target, export=task).name, a.json)


def convert_quantize(a: Namespace) -> int:
    with connect(a) as client:
        task = conversion_pb2.QuantizeTask(
            model=client.name("models", a.model),
            method=a.method,
            calibration=client.revision(a.calibration) if a.calibration else "",
            calibration_rows=a.rows,
            max_length=a.max_length,
        )
        return follow(client, client.convert(a.target, quantize=task).name, a.json)


def read_size(text: str) -> int:
    """Bytes of a size such as 2GB or 500MB. InvalidArgument (SHARD_SIZE_INVALID)."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    step = 1024 if match is not None and match[3] else 1000
    size = int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " ")) if match is not None else 0
    if not 0 < size < 1 << 63:
        raise InvalidArgument(f"--max-shard-size: cannot read {text!r}; write 2GB", reason="SHARD_SIZE_INVALID")
    return size
