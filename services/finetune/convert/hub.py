"""Fetching a model's plain files from the Hugging Face hub."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from services.finetune.convert.shards import progress
from services.finetune.errors import NotFound
from services.finetune.progress import Attempt
from services.finetune.store.hub import hub_errors

IN_FLIGHT = 4
_PLAIN = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def download(hub_id: str, file: str, attempt: Attempt, stop: threading.Event, folder: Path) -> Path:
    """Fetch ``owner/name`` or ``owner/name@revision`` into `folder`; `file` names one GGUF file of several.

    NotFound (MODEL_UNKNOWN, FILE_NOT_FOUND), Unavailable (HUB_UNREACHABLE), Cancelled (STOPPED) at the next piece.
    """
    from huggingface_hub import HfApi

    name, _, revision = hub_id.partition("@")
    with hub_errors("model", hub_id, "MODEL_UNKNOWN"):
        about = HfApi().model_info(name, revision=revision or None, files_metadata=True, timeout=30)
        sizes = {s.rfilename: s.size or 0 for s in about.siblings or ()}
        wanted = choose(list(sizes), file)
        attempt.emit("log", level="info", text=f"fetching {len(wanted)} files of {name} at {about.sha}")
        count = _counter(progress(attempt, stop), sum(sizes[path] for path in wanted))
        count(0)
        # The commit, not the branch: all files come from one state of the model.
        _fetch(name, str(about.sha), wanted, folder, count)
    return folder


def _counter(tell: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """Adds up bytes of several threads. A file's real size may differ from what the hub's list says."""
    lock, done = threading.Lock(), 0

    def count(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            tell(min(done, total), total)

    return count


def _fetch(name: str, commit: str, paths: Sequence[str], folder: Path, count: Callable[[int], None]) -> None:
    """The files, a few at a time. What `count` raises ends all of them at their next piece."""
    from huggingface_hub import hf_hub_download, utils

    class Bar(utils.tqdm):  # type: ignore[name-defined, misc]
        """The library's only word about pieces that came; what is printed is its parent's affair."""

        def update(self, n: float | None = 1) -> Any:
            count(int(n or 0))
            return super().update(n)

    def fetch(path: str) -> None:
        count(0)
        hf_hub_download(name, path, revision=commit, local_dir=folder, tqdm_class=Bar)

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        try:
            list(pool.map(fetch, paths))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


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
