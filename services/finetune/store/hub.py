"""What every way to the Hugging Face hub shares: its errors in our words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from services.finetune.errors import NotFound, Unavailable


@contextlib.contextmanager
def hub_errors(kind: str, hub_id: str, reason: str) -> Iterator[None]:
    """Turn what the hub's library says about a `kind` (model, dataset) into NotFound (`reason`) or Unavailable
    (HUB_UNREACHABLE)."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise NotFound(
            f"the hub has no {kind} {hub_id!r} that this service may read; check its name, or set HF_TOKEN",
            reason=reason,
            metadata={"hub_id": hub_id},
        ) from error
    # HTTPError is its http library's own, whichever that is.
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:  # type: ignore[attr-defined]
        raise Unavailable(
            f"the hub does not answer for {hub_id!r}: {(str(error).splitlines() or ['no answer'])[0]}; try again later, "
            "or bring the files from a folder",
            reason="HUB_UNREACHABLE",
        ) from error


def list_dataset(hub_id: str, name: str, revision: str) -> tuple[str, list[tuple[str, int, str]]]:
    """(commit, files) of a dataset: path, size in bytes, and the digest where the hub tells it. Errors as `hub_errors`."""
    from huggingface_hub import HfApi

    with hub_errors("dataset", hub_id, "SOURCE_NOT_FOUND"):
        about = HfApi().dataset_info(name, revision=revision or None, files_metadata=True, timeout=30)
    files = [(s.rfilename, s.size or 0, f"sha256:{s.lfs.sha256}" if s.lfs else "") for s in about.siblings or ()]
    return str(about.sha), files


def fetch_file(hub_id: str, name: str, commit: str, path: str, folder: Path) -> Path:
    """One file of a dataset at a commit, in `folder`. Errors as `hub_errors`."""
    from huggingface_hub import hf_hub_download

    with hub_errors("dataset", hub_id, "SOURCE_NOT_FOUND"):
        return Path(hf_hub_download(name, path, repo_type="dataset", revision=commit, local_dir=folder))
