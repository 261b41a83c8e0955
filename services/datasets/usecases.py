"""What the datasets room decides about datasets and revisions. It keeps no state of its own: records are refs."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.common.names import choose_id, now, parse
from services.datasets import arrivals
from services.datasets.arrivals import local
from services.datasets.diff import Diff, diff
from services.datasets.preview import Shown, show
from services.datasets.references import Allowed, Imported, import_files
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
from services.finetune.formats import Problem, Reading, Row
from services.finetune.store import Store, artifacts
from services.finetune.store.artifacts import File, Manifest, Ref
from services.finetune.store.delta import Signature

if TYPE_CHECKING:
    from services.finetune.tokenizer import Tokenizer
    from services.finetune.vision import ImageForm

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


class Datasets:
    """All rpcs of the room but the lists' paging. Methods block; they may be called from many threads."""

    def __init__(self, store: Store, scratch: Path, allowed: Allowed) -> None:
        self._store = store
        self._scratch = scratch
        self._allowed = allowed

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

    def commit(self, parent: str, files: Sequence[tuple[str, str]], reading: Reading, dry: bool) -> Revision:
        """CommitRevision of (path, digest) pairs; `dry` writes nothing."""
        self._dataset_ref(parent, "parent")
        found = self._files(files)
        if reading.format == FILES_FORMAT:
            reason, meta = "given by the caller", {"format": FILES_FORMAT, "rows": 0, "skipped_rows": 0, "skipped": []}
        else:
            found = arrivals.unpacked(self._store, found, self._scratch)
            reason, meta = self._read(found, reading)
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

    def diff(self, name: str, base: str) -> tuple[Revision, Revision, Diff]:
        """DiffRevisions: (the newer, the older, what changed)."""
        newer = self.revision(name)
        older = self.revision(base or self._before(newer))
        rows = newer.manifest.meta["rows"], older.manifest.meta["rows"]
        return newer, older, diff(self._store, newer.manifest, older.manifest, rows, self._scratch)

    def sign(self, name: str, path: str) -> tuple[File, Signature]:
        """GetFileSignature."""
        file = self.revision(name).manifest.file(path)
        return file, arrivals.sign(self._store, file, self._scratch)

    def compose(self, parent: str, base: str, path: str, delta: str, digest: str, size: int) -> None:
        """ComposeBlob."""
        self._dataset_ref(parent, "parent")
        if base.partition("/revisions/")[0] != parent:
            raise NotFound(f"{base} is no revision of {parent}", reason="REVISION_NOT_FOUND", metadata={"name": base})
        file = self.revision(base).manifest.file(path)
        arrivals.compose(self._store, file, delta, digest, size, self._scratch)

    def import_files(self, parent: str, source: tuple[str, str], include: Sequence[str]) -> Iterator[Imported]:
        """ImportFiles."""
        self._dataset_ref(parent, "parent")
        yield from import_files(self._store, self._allowed, source, include, self._scratch)

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
        tokenizer, own, form = self._model(model)
        chosen = load_template(template or own, tokenizer)
        shown = []
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            files = local(self._store, arrivals.row_files(revision.manifest.files), Path(folder))
            meta = revision.manifest.meta
            rows_of = formats.read_rows(files, meta["format"], meta.get("columns", {}))
            good = (r for r in rows_of if isinstance(r, Row))
            for n, row in enumerate(good):
                if n >= start:
                    shown.append(show(row, chosen, tokenizer, form, system, max_length))
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

    def _before(self, revision: Revision) -> str:
        """The name of the dataset's revision that was made before this one. NotFound (REVISION_NOT_FOUND)."""
        refs = artifacts.list_refs(self._store, revision.name.partition("/revisions/")[0] + "/revisions/")
        earlier = [(r.body["create_time"], r.name) for r in refs if r.body["create_time"] < revision.create_time]
        if not earlier:
            why = f"{revision.name} is the dataset's first revision; name another to compare it with"
            raise NotFound(why, reason="REVISION_NOT_FOUND", metadata={"name": revision.name})
        return str(max(earlier)[1])

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
        arrivals.check_paths([path for path, _ in files])
        found, missing = [], []
        for path, digest in files:
            blob = self._store.touch_blob(digest)
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

    def _read(self, files: Sequence[File], reading: Reading) -> tuple[str, dict[str, Any]]:
        """Read every row: (why this format, the manifest's meta)."""
        good, bad, problems, tolerated = 0, 0, list[Problem](), Counter[str]()
        rows, carried = arrivals.row_files(files), {f.path for f in files}
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            format, reason = reading.format, "given by the caller"
            if not format:
                format, reason = formats.sniff(local(self._store, rows, Path(folder)), reading.columns)
            for row in formats.read_rows(local(self._store, rows, Path(folder)), format, reading.columns, carried):
                if isinstance(row, Row):
                    good += 1
                    tolerated.update([row.tolerated] if row.tolerated else [])
                else:
                    bad += 1
                    problems += [row] if bad <= SHOWN_PROBLEMS else []
        if bad and (not reading.skip_bad_rows or not good):
            raise _rows_invalid(problems, bad, good)
        if not good:
            raise InvalidArgument("the files hold no row", reason="DATASET_EMPTY")
        reason += "".join(f"; warning: in {count} rows {what}" for what, count in tolerated.items())
        return reason, {
            "format": format,
            "rows": good,
            "skipped_rows": bad,
            "skipped": [asdict(p) for p in problems],
            **({"columns": dict(reading.columns)} if reading.columns else {}),
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

    def _model(self, name: str) -> tuple[Tokenizer, str, ImageForm | None]:
        from services.finetune.tokenizer import Tokenizer
        from services.finetune.vision import form_of

        _, manifest = self.model(name)
        tokenizer = Tokenizer.from_artifact(self._store, manifest)
        return tokenizer, str(manifest.meta.get("template", "")), form_of(self._store, manifest)


def _dataset(ref: Ref) -> Dataset:
    body = ref.body
    return Dataset(
        ref.name, body["display_name"], body["labels"], body["latest_revision"], body["create_time"], ref.etag
    )


def _revision(ref: Ref, manifest: Manifest) -> Revision:
    return Revision(ref.name, ref.body["digest"], ref.body["create_time"], ref.body["format_reason"], manifest)


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
