"""What the datasets room decides about datasets and revisions. It keeps no state of its own: records are refs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from services.common.names import choose_id, now, parse
from services.finetune import formats
from services.finetune.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Violation,
)
from services.finetune.formats import Problem, Row
from services.finetune.store import Store, artifacts
from services.finetune.store.artifacts import File, Manifest, Ref

if TYPE_CHECKING:
    from services.finetune.templates import Template
    from services.finetune.tokenizer import Tokenizer

WORKSPACE = "workspaces/{workspace}"
DATASET = WORKSPACE + "/datasets/{dataset}"
REVISION = DATASET + "/revisions/{revision}"
MODEL = WORKSPACE + "/models/{model}"

SHOWN_PROBLEMS = 100

FILES_FORMAT = "files"
"""Not a row format: the files are kept unread, as for a model to import."""
FILES_DESCRIPTION = "any files, kept as they are and not read as rows: a model's folder, to import it"


@dataclass(frozen=True, slots=True)
class Dataset:
    """As the message of the same name; `create_time` is RFC 3339."""

    name: str
    display_name: str
    labels: Mapping[str, str]
    latest_revision: str
    create_time: str
    etag: str


@dataclass(frozen=True, slots=True)
class Revision:
    """As the message of the same name. `name`, `digest` and `create_time` are "" when it was only validated."""

    name: str
    digest: str
    create_time: str
    format_reason: str
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Shown:
    """A row as training sees it: text in (piece, learned), token ids, and for each whether it is learned."""

    row: Row
    pieces: list[tuple[str, bool]]
    ids: list[int]
    mask: list[bool]
    truncated: int


class Datasets:
    """All rpcs of the room but the lists' paging. Methods block; they may be called from many threads."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self._store = store
        self._scratch = scratch

    # ------------------------------------------------------------------------------------------ datasets

    def create(
        self, parent: str, dataset_id: str, display_name: str, labels: Mapping[str, str], request_id: str, dry: bool
    ) -> Dataset:
        """CreateDataset; `dry` writes nothing."""
        parse(WORKSPACE, parent, "parent")
        name = f"{parent}/datasets/{choose_id(dataset_id, request_id, 'dataset')}"
        body = {
            "display_name": display_name,
            "labels": dict(labels),
            "latest_revision": "",
            "create_time": now(),
            "request_id": request_id,
        }
        if found := artifacts.get_ref(self._store, name):
            return self._first_answer(found, request_id)
        if dry:
            return _dataset(Ref(name, body, ""))
        # A deletion that was cut may have left revisions behind; a new dataset must not inherit them.
        self._delete_revisions(name)
        try:
            return _dataset(artifacts.put_ref(self._store, name, body, if_absent=True))
        except Aborted:
            return self._first_answer(self._dataset_ref(name), request_id)

    def get(self, name: str) -> Dataset:
        """GetDataset."""
        return _dataset(self._dataset_ref(name))

    def all(self, parent: str) -> list[Dataset]:
        """The datasets of a workspace."""
        parse(WORKSPACE, parent, "parent")
        return [_dataset(ref) for ref in artifacts.list_refs(self._store, f"{parent}/datasets/")]

    def delete(self, name: str, etag: str) -> None:
        """DeleteDataset."""
        ref = self._dataset_ref(name)
        try:
            artifacts.delete_ref(self._store, name, if_match=etag or ref.etag)
        except Aborted as error:
            raise Aborted(
                f"{name} has changed since etag {etag or ref.etag} was read; get it again",
                reason="ETAG_MISMATCH",
                metadata={"name": name},
            ) from error
        self._delete_revisions(name)

    # ------------------------------------------------------------------------------------------ revisions

    def commit(self, parent: str, files: Sequence[tuple[str, str]], format: str, skip: bool, dry: bool) -> Revision:
        """CommitRevision of (path, digest) pairs; `skip` leaves bad rows out, `dry` writes nothing."""
        self._dataset_ref(parent, "parent")
        found = self._files(files)
        if format == FILES_FORMAT:
            reason, meta = "given by the caller", {"format": format, "rows": 0, "skipped_rows": 0, "skipped": []}
        else:
            reason, meta = self._read(found, format, skip)
        manifest = Manifest("dataset", tuple(found), meta=meta)
        if dry:
            return Revision("", "", "", reason, manifest)
        digest = artifacts.publish(self._store, manifest)
        name = f"{parent}/revisions/r{digest.removeprefix('sha256:')[:12]}"
        body = {
            "digest": digest,
            "create_time": now(),
            "format": meta["format"],
            "format_reason": reason,
            "rows": meta["rows"],
            "skipped_rows": meta["skipped_rows"],
        }
        try:
            ref = artifacts.put_ref(self._store, name, body, if_absent=True)
        except Aborted:
            ref = self._revision_ref(name)
        self._advance(parent, ref)
        return _revision(ref, manifest)

    def revision(self, name: str) -> Revision:
        """GetRevision; the id ``latest`` is the newest's."""
        ref = self._revision_ref(name)
        return _revision(ref, artifacts.load(self._store, ref.body["digest"]))

    def revision_refs(self, parent: str) -> list[Ref]:
        """A dataset's revisions, unread: `load` gives one whole."""
        self._dataset_ref(parent, "parent")
        return list(artifacts.list_refs(self._store, f"{parent}/revisions/"))

    def load(self, ref: Ref) -> Revision:
        """The revision that a ref names."""
        return _revision(ref, artifacts.load(self._store, ref.body["digest"]))

    def preview(
        self, name: str, model: str, template: str, start: int, count: int, system: str, max_length: int
    ) -> tuple[list[Shown], str]:
        """PreviewRows; (rows, the template's name). `max_length` in tokens, 0 cuts nothing."""
        from services.finetune.templates import load_template

        revision = self.revision(name)
        rows = int(revision.manifest.meta["rows"])
        if min(start, count, max_length) < 0 or start >= rows:
            raise OutOfRange(
                f"{revision.name} has rows 0 to {rows - 1}; row {start} is none of them"
                if start < 0 or start >= rows
                else "row_count and max_length must not be negative",
                reason="ROW_OUT_OF_RANGE",
                metadata={"row_count": str(rows)},
            )
        tokenizer, own = self._model(model)
        chosen = load_template(template or own, tokenizer)
        shown = []
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            local = self._local(revision.manifest.files, Path(folder))
            good = (r for r in formats.read_rows(local, revision.manifest.meta["format"]) if isinstance(r, Row))
            for n, row in enumerate(good):
                if n >= start:
                    shown.append(_show(row, chosen, tokenizer, system, max_length))
                if len(shown) == min(count or 5, 100):
                    break
        return shown, chosen.name

    # ------------------------------------------------------------------------------------------ parts

    def _dataset_ref(self, name: str, field: str = "name") -> Ref:
        parse(DATASET, name, field)
        ref = artifacts.get_ref(self._store, name)
        if ref is None:
            raise NotFound(
                f"there is no dataset {name}; create it first", reason="DATASET_NOT_FOUND", metadata={"name": name}
            )
        return ref

    def _revision_ref(self, name: str) -> Ref:
        ids = parse(REVISION, name)
        dataset = artifacts.get_ref(self._store, name.partition("/revisions/")[0])
        wanted = name
        if dataset is not None and ids["revision"] == "latest":
            wanted = dataset.body["latest_revision"]
        ref = artifacts.get_ref(self._store, wanted) if dataset is not None and wanted else None
        if ref is None:
            why = "it has no revision yet" if dataset is not None and not wanted else "there is none"
            raise NotFound(f"{name}: {why}", reason="REVISION_NOT_FOUND", metadata={"name": name})
        return ref

    def _first_answer(self, found: Ref, request_id: str) -> Dataset:
        if request_id and found.body.get("request_id") == request_id:
            return _dataset(found)
        raise AlreadyExists(
            f"{found.name} exists already; choose another dataset_id",
            reason="DATASET_EXISTS",
            metadata={"name": found.name},
        )

    def _delete_revisions(self, dataset: str) -> None:
        for ref in list(artifacts.list_refs(self._store, f"{dataset}/revisions/")):
            artifacts.delete_ref(self._store, ref.name)

    def _advance(self, dataset: str, revision: Ref) -> None:
        """Make a revision the dataset's latest unless a newer one is; also mends a commit that was cut."""
        while True:
            ref = artifacts.get_ref(self._store, dataset)
            if ref is None:  # deleted while the rows were read
                artifacts.delete_ref(self._store, revision.name)
                raise NotFound(f"there is no dataset {dataset} any more", reason="DATASET_NOT_FOUND")
            latest = ref.body["latest_revision"]
            present = artifacts.get_ref(self._store, latest) if latest else None
            if present is not None and present.body["create_time"] >= revision.body["create_time"]:
                return
            try:
                body = {**ref.body, "latest_revision": revision.name}
                artifacts.put_ref(self._store, dataset, body, if_match=ref.etag)
                return
            except Aborted:
                continue

    def _files(self, files: Sequence[tuple[str, str]]) -> list[File]:
        """The files with their sizes, once all are safe and there."""
        if not files:
            raise InvalidArgument("files: name at least one", reason="DATASET_EMPTY")
        _check_paths([path for path, _ in files])
        found, missing = [], []
        for path, digest in files:
            blob = self._store.stat_blob(digest)
            if blob is None:
                missing.append(Violation(f"files[{path}].digest", f"{digest} is not uploaded", "BLOB_MISSING"))
            else:
                found.append(File(path, digest, blob.size))
        if missing:
            raise FailedPrecondition(
                f"{len(missing)} of {len(files)} files are not in the store; upload them first, as {missing[0].field}",
                reason="BLOB_MISSING",
                violations=missing[:SHOWN_PROBLEMS],
            )
        return found

    def _local(self, files: Sequence[File], folder: Path) -> Iterator[tuple[str, Path]]:
        """(path in the artifact, path on disk), each file fetched when it is its turn."""
        for n, file in enumerate(files):
            path = folder / str(n)
            self._store.fetch_blob(file.digest, path)
            yield file.path, path
            path.unlink()

    def _read(self, files: Sequence[File], format: str, skip: bool) -> tuple[str, dict[str, Any]]:
        """Read every row: (why this format, the manifest's meta)."""
        good, bad, problems = 0, 0, list[Problem]()
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            reason = "given by the caller"
            if not format:
                format, reason = formats.sniff(self._local(files, Path(folder)))
            for row in formats.read_rows(self._local(files, Path(folder)), format):
                if isinstance(row, Row):
                    good += 1
                else:
                    bad += 1
                    problems += [row] if bad <= SHOWN_PROBLEMS else []
        if bad and (not skip or not good):
            raise _rows_invalid(problems, bad, good)
        if not good:
            raise InvalidArgument("the files hold no row", reason="DATASET_EMPTY")
        return reason, {
            "format": format,
            "rows": good,
            "skipped_rows": bad,
            "skipped": [asdict(p) for p in problems],
        }

    def model(self, name: str) -> tuple[str, Manifest]:
        """(digest, artifact) of a model by name. NotFound (MODEL_NOT_FOUND)."""
        parse(MODEL, name, "model")
        ref = artifacts.get_ref(self._store, name)
        if ref is None:
            raise NotFound(
                f"there is no model {name}; import it first", reason="MODEL_NOT_FOUND", metadata={"name": name}
            )
        return ref.body["digest"], artifacts.load(self._store, ref.body["digest"])

    def _model(self, name: str) -> tuple[Tokenizer, str]:
        from services.finetune.tokenizer import Tokenizer

        _, manifest = self.model(name)
        return Tokenizer.from_artifact(self._store, manifest), str(manifest.meta.get("template", ""))


def _dataset(ref: Ref) -> Dataset:
    body = ref.body
    return Dataset(
        ref.name, body["display_name"], body["labels"], body["latest_revision"], body["create_time"], ref.etag
    )


def _revision(ref: Ref, manifest: Manifest) -> Revision:
    return Revision(ref.name, ref.body["digest"], ref.body["create_time"], ref.body["format_reason"], manifest)


def _check_paths(paths: Sequence[str]) -> None:
    seen: set[str] = set()
    for path in paths:
        artifacts.check_path(path)
        if path in seen:
            raise InvalidArgument(f"files: the path {path!r} stands twice", reason="PATH_UNSAFE")
        seen.add(path)
    for path in paths:
        for folder in PurePosixPath(path).parents:
            if str(folder) in seen:
                raise InvalidArgument(f"files: {str(folder)!r} is a file and a folder", reason="PATH_UNSAFE")


def _rows_invalid(problems: Sequence[Problem], bad: int, good: int) -> InvalidArgument:
    violations = [
        Violation(f"files[{p.file}].rows[{p.row}]" + (f".{p.field}" if p.field else ""), p.message, p.reason)
        for p in problems
    ]
    first = violations[0]
    return InvalidArgument(
        f"{bad} of {good + bad} rows cannot be read, the first is {first.field}: {first.message}; mend them, or leave "
        "bad rows out if others are good",
        reason="ROWS_INVALID",
        metadata={"bad_rows": str(bad), "good_rows": str(good)},
        violations=violations,
    )


def _show(row: Row, template: Template, tokenizer: Tokenizer, system: str, max_length: int) -> Shown:
    from services.finetune.templates import IMAGE_ID, encode

    pieces = template.pieces(row.conversation, system)
    encoded = encode(pieces, tokenizer, IMAGE_ID)
    cut = max(len(encoded.ids) - max_length, 0) if max_length else 0
    ids, mask = encoded.ids[: len(encoded.ids) - cut], encoded.mask[: len(encoded.ids) - cut]
    texts: list[tuple[str, bool]] = []
    if not cut:
        for trained, run in groupby(pieces, key=lambda p: p.trained):
            texts.append(("".join(p.text for p in run), trained))
    else:
        # What is left may end within a word or a character: the tokens tell, not the template.
        for trained, tokens in groupby(zip(ids, mask, strict=True), key=lambda t: t[1]):
            texts.append((tokenizer.decode([i for i, _ in tokens if i != IMAGE_ID], skip_special=False), trained))
    return Shown(row, texts, ids, mask, cut)
