"""EXPORT: a model's files for use elsewhere: a transformers folder, one safetensors file, GGUF, or LLaVA's other layouts;
then, if asked, sent.

The artifact is there before anything is sent, and is what `quartet model download` gives. What did not change shares its
blobs with the model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.finetune.convert.reshard import made_from, recut, whole
from services.finetune.convert.rest import rest_of, write_template
from services.finetune.convert.shards import progress
from services.finetune.convert.targets import send
from services.finetune.modules import LLAVA
from services.finetune.orders import ExportTask
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import File, Manifest, load, materialise, publish, publish_directory

CARD = "README.md"
_NO_LIMIT = 1 << 62
_SMALL = (".json", ".jinja", ".txt", ".model")


def export(task: ExportTask, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    """Do an ExportTask; the digest of an "exported" artifact.

    FailedPrecondition (MODEL_NOT_WHOLE, MODEL_NOT_ADAPTER, ADAPTER_UNSUPPORTED, ARCHITECTURE_UNSUPPORTED,
    MODEL_UNSUPPORTED, TOKENIZER_UNSUPPORTED, LIBRARY_MISSING), InvalidArgument (NUMBERS_TOO_LARGE), what `send` raises,
    Cancelled (STOPPED).
    """
    any_kind = task.form in ("hf", "xtuner")
    source = load(attempt.store, task.model.digest) if any_kind else whole(attempt, task.model)
    made = _FORMS[task.form](task, source, attempt, stop, workdir)
    if task.destination:
        sent = send(task.destination, load(attempt.store, made), attempt, stop, workdir / "sent", task.public)
        attempt.emit("log", level="info", text=f"sent to {sent}")
    return made


def _meta(task: ExportTask, source: Manifest, **more: str) -> dict[str, Any]:
    return {**source.meta, "form": task.form, **more}


def _folder(task: ExportTask, source: Manifest, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    """The weights as they are, with a template that says what tuning used, and a card."""
    progress(attempt, stop)(source.size, source.size)
    return _publish(task, source, list(source.files), attempt, workdir)


def _one_file(task: ExportTask, source: Manifest, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    files = recut(source, "", _NO_LIMIT, attempt, stop)
    return _publish(task, source, [*files, *rest_of(source)], attempt, workdir)


def _publish(task: ExportTask, source: Manifest, files: list[File], attempt: Attempt, workdir: Path) -> str:
    small = [f.path for f in source.files if f.path.endswith(_SMALL)]
    folder = materialise(attempt.store, source, workdir / "source", small)
    made, out = {f.path: f for f in files}, workdir / "out"
    out.mkdir()
    if "tokenizer.json" in made:
        write_template(folder, out, source.meta)
    (out / CARD).write_text(card(task.model.name, source))
    for path in out.iterdir():
        blob = attempt.store.put_file(path)
        made[path.name] = File(path.name, blob.digest, blob.size)
    ordered = tuple(made[path] for path in sorted(made))
    return publish(attempt.store, Manifest("exported", ordered, made_from(task.model), _meta(task, source)))


def _xtuner(task: ExportTask, source: Manifest, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    from services.finetune.convert.export_llava import xtuner_files

    files = xtuner_files(source, attempt, workdir)
    total = sum(f.size for f in files)
    progress(attempt, stop)(total, total)
    return _publish(task, source, files, attempt, workdir)


def _official_llava(task: ExportTask, source: Manifest, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    from services.finetune.convert.export_llava import official_files

    return _publish(task, source, official_files(task, source, attempt, stop), attempt, workdir)


def _gguf(task: ExportTask, source: Manifest, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    from services.finetune.convert.gguf_write import check_supported, write_gguf
    from services.finetune.tokenizer import Tokenizer

    check_supported(source.meta["architecture"])
    folder = materialise(attempt.store, source, workdir / "source")
    out, beside = workdir / "out", workdir / "beside"
    for made in (out, beside):
        made.mkdir()
    write_template(folder, beside, source.meta)
    jinja = beside / "chat_template.jinja"
    template = jinja.read_text("utf-8") if jinja.exists() else Tokenizer.from_files(folder).chat_template
    kind = task.gguf_type or ("bf16" if source.meta["dtype"] == "bfloat16" else "f16")
    name = task.model.name.rpartition("/")[2]

    def warn(text: str) -> None:
        attempt.emit("log", level="warning", text=text)

    write_gguf(folder, out / f"{name}-{kind}.gguf", kind, name, template, progress(attempt, stop), warn)
    return publish_directory(attempt.store, "exported", out, made_from(task.model), _meta(task, source, gguf_type=kind))


_FORMS = {"hf": _folder, "safetensors": _one_file, "gguf": _gguf, "xtuner": _xtuner, "llava": _official_llava}


def _tag(source: Manifest) -> str:
    return "image-text-to-text" if source.meta["architecture"] == LLAVA else "text-generation"


def card(name: str, source: Manifest) -> str:
    """A model card: what a hub reads (YAML between lines of dashes) and where the model comes from."""
    base = str(source.meta.get("base_name", "")).rpartition("/")[2]
    library = "peft" if source.kind == "adapter" else "transformers"
    head: Mapping[str, str] = {
        "library_name": library,
        **({"pipeline_tag": _tag(source)} if source.kind != "adapter" else {}),
    }
    lines = [f"{key}: {value}" for key, value in head.items()]
    made = "\n".join(f"- {p.role}: `{p.name.rpartition('/')[2] or p.digest}` (`{p.digest}`)" for p in source.parents)
    template = json.dumps(source.meta["template"] or "none")
    return (
        "---\n" + "\n".join(lines) + "\n---\n\n"
        f"# {name.rpartition('/')[2]}\n\n"
        f"A model of kind {source.kind}, {source.meta['architecture']}, prompt template {template}"
        + (f", tuned from {base}" if base else "")
        + ".\n"
        + (f"\nMade from:\n\n{made}\n" if made else "")
    )
