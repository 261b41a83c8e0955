"""Fetching a model's plain files from the Hugging Face hub."""

from __future__ import annotations

import glob
import threading
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from services.finetune.errors import Cancelled, NotFound, Unavailable
from services.finetune.progress import Attempt

_PLAIN = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def download(hub_id: str, file: str, attempt: Attempt, stop: threading.Event, folder: Path) -> Path:
    """Fetch ``owner/name`` or ``owner/name@revision`` into `folder`; `file` names one GGUF file of several.

    NotFound (MODEL_UNKNOWN, FILE_NOT_FOUND), Unavailable (HUB_UNREACHABLE), Cancelled (STOPPED) between its steps.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    name, _, revision = hub_id.partition("@")
    try:
        about = HfApi().model_info(name, revision=revision or None, timeout=30)
        wanted = choose([s.rfilename for s in about.siblings or ()], file)
        attempt.emit("log", level="info", text=f"fetching {len(wanted)} files of {name} at {about.sha}")
        if stop.is_set():
            raise Cancelled("stopped before anything was kept", reason="STOPPED")
        # The commit, not the branch: all files come from one state of the model.
        snapshot_download(
            name, revision=about.sha, local_dir=folder, allow_patterns=[glob.escape(path) for path in wanted]
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise NotFound(
            f"the hub has no model {hub_id!r} that this service may read; check its name, or set HF_TOKEN",
            reason="MODEL_UNKNOWN",
            metadata={"hub_id": hub_id},
        ) from error
    # HTTPError is its http library's own, whichever that is.
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:  # type: ignore[attr-defined]
        raise Unavailable(
            f"the hub does not answer for {hub_id!r}: {(str(error).splitlines() or ['no answer'])[0]}; try again later, "
            "or import from a folder",
            reason="HUB_UNREACHABLE",
        ) from error
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
