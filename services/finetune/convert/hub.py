"""Fetching a model's plain files from the Hugging Face hub."""

from __future__ import annotations

import glob
import threading
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from services.finetune.errors import Cancelled, NotFound
from services.finetune.progress import Attempt
from services.finetune.store.hub import hub_errors

_PLAIN = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def download(hub_id: str, file: str, attempt: Attempt, stop: threading.Event, folder: Path) -> Path:
    """Fetch ``owner/name`` or ``owner/name@revision`` into `folder`; `file` names one GGUF file of several.

    NotFound (MODEL_UNKNOWN, FILE_NOT_FOUND), Unavailable (HUB_UNREACHABLE), Cancelled (STOPPED) between its steps.
    """
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = hub_id.partition("@")
    with hub_errors("model", hub_id, "MODEL_UNKNOWN"):
        about = HfApi().model_info(name, revision=revision or None, timeout=30)
        wanted = choose([s.rfilename for s in about.siblings or ()], file)
        attempt.emit("log", level="info", text=f"fetching {len(wanted)} files of {name} at {about.sha}")
        if stop.is_set():
            raise Cancelled("stopped before anything was kept", reason="STOPPED")
        # The commit, not the branch: all files come from one state of the model.
        snapshot_download(
            name, revision=about.sha, local_dir=folder, allow_patterns=[glob.escape(path) for path in wanted]
        )
    return folder


def choose(files: Sequence[str], file: str) -> list[str]:
    """The files worth fetching: weights once, in the best form there is, and no code. NotFound (FILE_NOT_FOUND)."""
    top = [f for f in files if PurePosixPath(f).name == f]
    if file and file not in top:
        raise NotFound(f"the model has no file {file!r}", reason="FILE_NOT_FOUND")
    plain = [f for f in top if f.endswith(_PLAIN)]
    if file:
        return [*plain, file]
    safe = [f for f in top if f.endswith(".safetensors") and not f.startswith("consolidated")]
    pickled = [f for f in top if f.startswith("pytorch_model") and f.endswith(".bin")]
    return plain + (safe or pickled or [f for f in top if f.endswith(".gguf")])
