"""Sending an artifact's files elsewhere: to a Hugging Face hub, an S3 prefix, or an OCI registry.

Where that may be is the service's to say (--export-prefixes); credentials are this process's own: HF_TOKEN (and HF_ENDPOINT
for another hub), AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, Docker's config.json in DOCKER_CONFIG. None is ever in an
order or a log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from services.finetune.convert.shards import progress
from services.finetune.errors import (
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    QuartetError,
    Unavailable,
)
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import File, Manifest, materialise

LINEAGE = "quartet_manifest.json"
"""Sent with the files: parents, template, certificate."""
_CHUNK_BYTES = 16 << 20
_LAYER = "application/vnd.quartet.model.file.v1"
_ARTIFACT = "application/vnd.quartet.model.v1"
_EMPTY = "application/vnd.oci.empty.v1+json"

Tell = Callable[[int, int], None]


def send(
    destination: str, manifest: Manifest, attempt: Attempt, stop: threading.Event, folder: Path, public: bool
) -> str:
    """Send all files of an artifact; where they are now, without what is secret. `folder` is room to work in.

    InvalidArgument (DESTINATION_MALFORMED), FailedPrecondition (DESTINATION_TAKEN, LIBRARY_MISSING), PermissionDenied
    (DESTINATION_REFUSED), Unavailable (HUB_UNREACHABLE, STORE_UNREACHABLE, REGISTRY_UNREACHABLE), Cancelled (STOPPED);
    whatever is raised, no half of it can be taken for the whole.
    """
    materialise(attempt.store, manifest, folder)
    lineage = json.dumps(asdict(manifest), sort_keys=True, indent=1, ensure_ascii=False)
    (folder / LINEAGE).write_text(lineage, "utf-8")
    files = [*manifest.files, File(LINEAGE, "", len(lineage.encode()))]
    send_to = {"hf": _hub, "s3": _s3, "oci": _registry}.get(urlsplit(destination).scheme)
    if send_to is None:
        raise InvalidArgument(f"not a destination: {destination[:200]!r}", reason="DESTINATION_MALFORMED")
    tell = progress(attempt, stop)
    tell(0, manifest.size)
    return send_to(destination, files, folder, tell, public)


# ---------------------------------------------------------------------------------------------- hub


def _hub(destination: str, files: list[File], folder: Path, tell: Tell, public: bool) -> str:
    """One commit of all files: until it is made nobody sees any of them."""
    from huggingface_hub import CommitOperationAdd, HfApi

    name, _, branch = destination.removeprefix("hf://").partition("@")
    total, done = sum(f.size for f in files), 0
    api = HfApi()
    with _hub_errors(name):
        api.create_repo(name, private=not public, exist_ok=True)
        if branch:
            api.create_branch(name, branch=branch, exist_ok=True)
        added = []
        for file in files:
            one = CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=folder / file.path)
            # Large files go one by one, so that the job can be cancelled between them.
            api.preupload_lfs_files(name, [one], revision=branch or None)
            added.append(one)
            done += file.size
            tell(done, total)
        made = api.create_commit(name, added, commit_message="Export from Quartet", revision=branch or None)
    return f"hf://{name}@{made.oid}"


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except QuartetError:
        raise
    # HTTPError is its http library's own, whichever that is; RuntimeError is what it makes of one in sending a file.
    except (errors.HTTPError, errors.LocalTokenNotFoundError, OSError, RuntimeError) as error:  # type: ignore[attr-defined]
        answer = getattr(error.__cause__ if type(error) is RuntimeError else error, "response", None)
        if isinstance(error, errors.LocalTokenNotFoundError) or (
            answer is not None and 400 <= answer.status_code < 500
        ):
            raise PermissionDenied(
                f"the hub refuses {name}: {_first_line(error)}; set HF_TOKEN where workers run to a token that may write "
                "there",
                reason="DESTINATION_REFUSED",
            ) from error
        raise Unavailable(
            f"the hub does not answer for {name!r}: {_first_line(error)}; try again later", reason="HUB_UNREACHABLE"
        ) from error


# ---------------------------------------------------------------------------------------------- S3


def _s3(destination: str, files: list[File], folder: Path, tell: Tell, public: bool) -> str:
    """The lineage goes last: where it is, all is. What was sent goes away again if the rest does not follow."""
    from services.finetune.store.s3 import S3Store

    place = S3Store(destination)
    wanted = {place.prefix + f.path for f in files}
    found = {key for key, _ in place.list_files()}
    if place.prefix + LINEAGE in found or found - wanted:
        raise FailedPrecondition(
            f"there are files below s3://{place.bucket}/{place.prefix} already; name a prefix of its own",
            reason="DESTINATION_TAKEN",
        )
    total, done = sum(f.size for f in files), 0
    try:
        for file in files:
            with place.errors():
                place.patient.fput_object(place.bucket, place.prefix + file.path, str(folder / file.path))
            done += file.size
            tell(done, total)
    except QuartetError:
        for file in files:
            with contextlib.suppress(QuartetError):
                place.drop(place.prefix + file.path)
        raise
    return f"s3://{place.bucket}/{place.prefix.rstrip('/')}"


# ---------------------------------------------------------------------------------------------- OCI registry


def _registry(destination: str, files: list[File], folder: Path, tell: Tell, public: bool) -> str:
    """A file a layer, titled by its path as `oras pull` wants it; the manifest goes last and gets the tag."""
    parts = urlsplit(destination)
    client, container = _client(parts.netloc + parts.path, parse_qs(parts.query).get("plain-http") == ["on"])
    total, done, layers = sum(f.size for f in files), 0, []
    with _registry_errors(container.registry):
        for file in files:
            layers.append(_layer(client, container, folder / file.path, file))
            done += file.size
            tell(done, total)
        empty = folder / ".empty"
        empty.write_bytes(b"{}")
        config = _described(empty, _EMPTY, "")
        client._check_200_response(client.upload_blob(str(empty), container, config))
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": _ARTIFACT,
            "config": config,
            "layers": layers,
        }
        answer = client.upload_manifest(manifest, container)
        client._check_200_response(answer)
    digest = answer.headers.get("Docker-Content-Digest", "")
    return f"oci://{container.registry}/{container.api_prefix}:{container.tag}" + (f"@{digest}" if digest else "")


def _client(name: str, plain: bool) -> tuple[Any, Any]:
    """oras' client and the place that it pushes to. Registries on this machine speak plain HTTP, as Docker takes it."""
    try:
        import oras.container
        import oras.provider
        import requests
    except ImportError as error:
        raise FailedPrecondition(
            "sending to an OCI registry wants the library oras: pip install 'quartet[export]' where workers run",
            reason="LIBRARY_MISSING",
            metadata={"library": "oras"},
        ) from error
    container = oras.container.Container(name)
    here = container.registry.partition(":")[0] in ("localhost", "127.0.0.1")
    scheme = "http" if plain or here else "https"
    with _registry_errors(container.registry):
        about = requests.get(f"{scheme}://{container.registry}/v2/", timeout=30, allow_redirects=False)
        basic = about.headers.get("WWW-Authenticate", "").lower().startswith("basic")
        client = oras.provider.Registry(
            container.registry, insecure=scheme == "http", auth_backend="basic" if basic else "token"
        )
        own = os.environ.get("DOCKER_CONFIG")
        client.auth.load_configs(container, [str(Path(own) / "config.json")] if own else None)
        if basic and not getattr(client.auth, "_basic_auth", None):
            raise ValueError("it wants credentials")
    if basic:
        # Else each piece would be sent in vain first.
        client.session.headers.update(client.auth.get_auth_header())
    # Its own tries go on for two minutes, also where the registry said no; the job is tried again as a whole.
    client.do_request = types.MethodType(oras.provider.Registry.do_request.__wrapped__, client)
    return client, container


def _layer(client: Any, container: Any, path: Path, file: File) -> dict[str, Any]:
    layer = _described(path, _LAYER, file.path)
    # In pieces: in one request oras would hold the whole file in memory.
    answer = client.upload_blob(str(path), container, layer, do_chunked=True, chunk_size=_CHUNK_BYTES)
    client._check_200_response(answer)
    return layer


def _described(path: Path, media: str, title: str) -> dict[str, Any]:
    with path.open("rb") as source:
        digest = "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
    about: dict[str, Any] = {"mediaType": media, "digest": digest, "size": path.stat().st_size}
    return {**about, "annotations": {"org.opencontainers.image.title": title}} if title else about


@contextlib.contextmanager
def _registry_errors(registry: str) -> Iterator[None]:
    import requests
    from oras.auth import AuthenticationException

    try:
        yield
    except QuartetError:
        raise
    except requests.RequestException as error:
        raise Unavailable(
            f"the registry {registry} does not answer; try again later", reason="REGISTRY_UNREACHABLE"
        ) from error
    except (ValueError, AuthenticationException) as error:  # all that oras says of an answer it did not want
        raise PermissionDenied(
            f"the registry {registry} refuses: {_first_line(error)}; give workers a Docker config.json (DOCKER_CONFIG) with "
            "credentials that may push there",
            reason="DESTINATION_REFUSED",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no answer"])[0][:300]
