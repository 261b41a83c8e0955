"""The datasets contract: messages in, use-cases, messages out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import empty_pb2, timestamp_pb2
from quartet.datasets.v1 import datasets_pb2 as pb
from quartet.datasets.v1 import datasets_pb2_grpc as rpc

from services.common import wire
from services.common.paging import page
from services.common.records import Record
from services.datasets import messages, usecases
from services.datasets.diff import SHOWN, Diff
from services.datasets.preparing import Preparing
from services.datasets.preview import Shown
from services.datasets.uploads import Uploads, UploadStatus, Writing
from services.datasets.usecases import Datasets
from services.datasets.validating import Validating
from services.finetune import formats, templates
from services.finetune.errors import InvalidArgument
from services.finetune.formats import Reading
from services.finetune.store.artifacts import File, Ref

LISTED_FILES_BYTES = 2 << 20
"""A list's message has room for so much; beyond that revisions come without their files."""


class Servicer(rpc.DatasetsServicer):
    """See datasets.proto. Plain methods run in threads; the one stream is a coroutine."""

    def __init__(self, datasets: Datasets, uploads: Uploads, preparing: Preparing, validating: Validating) -> None:
        self._datasets = datasets
        self._uploads = uploads
        self._preparing = preparing
        self._validating = validating

    def CreateDataset(self, request: pb.CreateDatasetRequest, context: Any) -> pb.Dataset:
        wanted = request.dataset
        made = self._datasets.create(
            request.parent,
            request.dataset_id,
            wanted.display_name,
            wanted.labels,
            request.request_id,
            request.validate_only,
        )
        return _dataset(made)

    def GetDataset(self, request: pb.GetDatasetRequest, context: Any) -> pb.Dataset:
        return _dataset(self._datasets.get(request.name))

    def ListDatasets(self, request: pb.ListDatasetsRequest, context: Any) -> pb.ListDatasetsResponse:
        def fields(d: usecases.Dataset) -> dict[str, Any]:
            return {"name": d.name, "display_name": d.display_name, "labels": d.labels, "create_time": d.create_time}

        found, token = page(self._datasets.all(request.parent), fields=fields, **_page(request), default_order="name")
        return pb.ListDatasetsResponse(datasets=[_dataset(d) for d in found], next_page_token=token)

    def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: Any) -> empty_pb2.Empty:
        self._datasets.delete(request.name, request.etag)
        return empty_pb2.Empty()

    def BeginUpload(self, request: pb.BeginUploadRequest, context: Any) -> pb.BlobStatus:
        return _status(self._uploads.begin(request.parent, request.digest, request.size_bytes, request.direct))

    async def WriteBlob(self, requests: AsyncIterator[pb.WriteBlobRequest], context: Any) -> pb.BlobStatus:
        first = await anext(aiter(requests), pb.WriteBlobRequest())
        writing = await asyncio.to_thread(self._uploads.open, first.upload)
        last = await _take(writing, first, requests)
        return _status(await asyncio.to_thread(writing.finish if last else writing.status))

    def GetBlobStatus(self, request: pb.GetBlobStatusRequest, context: Any) -> pb.BlobStatus:
        return _status(self._uploads.status(request.upload))

    def GetFileSignature(self, request: pb.GetFileSignatureRequest, context: Any) -> pb.FileSignature:
        file, found = self._datasets.sign(request.name, request.path)
        return pb.FileSignature(
            digest=file.digest, size_bytes=file.size, chunk_bytes=found.chunk_bytes, chunks=found.chunks
        )

    def ComposeBlob(self, request: pb.ComposeBlobRequest, context: Any) -> pb.BlobStatus:
        r = request
        self._datasets.compose(r.parent, r.base_revision, r.base_path, r.delta, r.digest, r.size_bytes)
        return _status(self._uploads.settle(r.parent, r.digest, r.size_bytes))

    async def ImportFiles(self, request: pb.ImportFilesRequest, context: Any) -> AsyncIterator[pb.ImportFilesResponse]:
        kind = request.WhichOneof("source") or ""
        source = (kind, getattr(request, kind) if kind else "")
        steps = self._datasets.import_files(request.parent, source, request.include)
        while (step := await asyncio.to_thread(next, steps, None)) is not None:
            files = [_file(step.file)] if step.file else []
            yield pb.ImportFilesResponse(done_bytes=step.done, total_bytes=step.total, files=files)

    def CommitRevision(self, request: pb.CommitRevisionRequest, context: Any) -> pb.Revision:
        files = [(f.path, f.digest) for f in request.files]
        skip = request.bad_rows == pb.CommitRevisionRequest.BAD_ROWS_SKIP
        reading = Reading(request.format, dict(request.columns), skip)
        return _revision(self._datasets.commit(request.parent, files, reading, request.validate_only))

    def GetRevision(self, request: pb.GetRevisionRequest, context: Any) -> pb.Revision:
        return _revision(self._datasets.revision(request.name))

    def ListRevisions(self, request: pb.ListRevisionsRequest, context: Any) -> pb.ListRevisionsResponse:
        def fields(ref: Ref) -> dict[str, Any]:
            return {"name": ref.name, **ref.body}

        found, token = page(
            self._datasets.revision_refs(request.parent), fields=fields, **_page(request), default_order="create_time"
        )
        answer = pb.ListRevisionsResponse(next_page_token=token)
        left = LISTED_FILES_BYTES
        for made in (_revision(self._datasets.load(ref)) for ref in found):
            left -= made.ByteSize()
            if left < 0:
                made.ClearField("files")
            answer.revisions.append(made)
        return answer

    def DiffRevisions(self, request: pb.DiffRevisionsRequest, context: Any) -> pb.DiffRevisionsResponse:
        newer, older, found = self._datasets.diff(request.name, request.base)
        return _diff(newer.name, older.name, found)

    def PreviewRows(self, request: pb.PreviewRowsRequest, context: Any) -> pb.PreviewRowsResponse:
        shown, template = self._datasets.preview(
            request.name,
            request.model,
            request.template,
            request.start_row,
            request.row_count,
            request.system,
            request.max_length,
        )
        return pb.PreviewRowsResponse(rows=[_row(s) for s in shown], template=template)

    def ValidateRevision(self, request: pb.ValidateRevisionRequest, context: Any) -> pb.Validation:
        spec = {k: getattr(request, k) for k in ("model", "template", "system", "max_length")}
        asked = (request.request_id, wire.fingerprint(request))
        return self._validation(self._validating.create(request.name, request.validation_id, spec, asked))

    def GetValidation(self, request: pb.GetValidationRequest, context: Any) -> pb.Validation:
        return self._validation(self._validating.get(request.name))

    def ListValidations(self, request: pb.ListValidationsRequest, context: Any) -> pb.ListValidationsResponse:
        found, token = self._validating.jobs.page(request.parent, **_paging(request))
        return pb.ListValidationsResponse(
            validations=[messages.validation(r, None) for r in found], next_page_token=token
        )

    def CancelValidation(self, request: pb.CancelValidationRequest, context: Any) -> pb.Validation:
        return self._validation(self._validating.cancel(request.name))

    def DeleteValidation(self, request: pb.DeleteValidationRequest, context: Any) -> empty_pb2.Empty:
        self._validating.delete(request.name, request.etag)
        return empty_pb2.Empty()

    async def WatchValidation(self, request: pb.WatchValidationRequest, context: Any) -> AsyncIterator[pb.DatasetEvent]:
        async for sequence, event in wire.follow(self._validating.watch(request.name, request.after_sequence)):
            yield messages.event(sequence, event)

    def PrepareDataset(self, request: pb.PrepareDatasetRequest, context: Any) -> pb.PreparedDataset:
        asked_for = ("model", "template", "system", "max_length", "separate_rows", "seed", "held_out")
        spec = {k: getattr(request, k) for k in asked_for}
        spec["sources"] = [{"revision": s.revision, "weight": s.weight} for s in request.sources]
        asked = (request.request_id, wire.fingerprint(request))
        return messages.prepared(self._preparing.prepare(request.parent, spec, asked, request.validate_only))

    def GetPreparedDataset(self, request: pb.GetPreparedDatasetRequest, context: Any) -> pb.PreparedDataset:
        return messages.prepared(self._preparing.get(request.name))

    def ListPreparedDatasets(
        self, request: pb.ListPreparedDatasetsRequest, context: Any
    ) -> pb.ListPreparedDatasetsResponse:
        found, token = self._preparing.jobs.page(request.parent, **_paging(request))
        return pb.ListPreparedDatasetsResponse(
            prepared_datasets=[messages.prepared(r) for r in found], next_page_token=token
        )

    def CancelPreparedDataset(self, request: pb.CancelPreparedDatasetRequest, context: Any) -> pb.PreparedDataset:
        return messages.prepared(self._preparing.cancel(request.name))

    def DeletePreparedDataset(self, request: pb.DeletePreparedDatasetRequest, context: Any) -> empty_pb2.Empty:
        self._preparing.delete(request.name, request.etag)
        return empty_pb2.Empty()

    async def WatchPreparedDataset(
        self, request: pb.WatchPreparedDatasetRequest, context: Any
    ) -> AsyncIterator[pb.DatasetEvent]:
        async for sequence, event in wire.follow(self._preparing.watch(request.name, request.after_sequence)):
            yield messages.event(sequence, event)

    def _validation(self, record: Record) -> pb.Validation:
        return messages.validation(record, self._validating.report(record))

    def ListFormats(self, request: pb.ListFormatsRequest, context: Any) -> pb.ListFormatsResponse:
        known = [pb.Format(name=f.name, description=f.description) for f in formats.FORMATS.values()]
        files = pb.Format(name=usecases.FILES_FORMAT, description=usecases.FILES_DESCRIPTION)
        return pb.ListFormatsResponse(formats=[*known, files])

    def ListTemplates(self, request: pb.ListTemplatesRequest, context: Any) -> pb.ListTemplatesResponse:
        own = pb.Template(name="tokenizer", example="the model's own chat template")
        named = [pb.Template(name=name, example=templates.example(name)) for name in templates.TEMPLATES]
        return pb.ListTemplatesResponse(templates=[own, *named])


async def _take(writing: Writing, first: pb.WriteBlobRequest, rest: AsyncIterator[pb.WriteBlobRequest]) -> bool:
    """Write the chunks of a stream, the next one arriving while one is written; whether the last said `finish`."""
    loop = asyncio.get_running_loop()
    request: pb.WriteBlobRequest | None = first
    pending: asyncio.Future[None] | None = None
    try:
        while request is not None:
            if request.upload not in ("", first.upload):
                raise InvalidArgument(
                    f"upload: a stream writes one upload, {first.upload}, not {request.upload[:200]!r} too",
                    reason="NAME_MALFORMED",
                )
            if pending is not None:
                await pending
            pending = loop.run_in_executor(None, writing.write, request.offset_bytes, request.data, request.crc32c)
            if request.finish:
                await pending
                return True
            request = await anext(aiter(rest), None)
        return False
    finally:
        # Also when the client went away: what came whole is kept for the next stream.
        if pending is not None:
            await asyncio.wait([pending])
        await asyncio.to_thread(writing.flush)


def _paging(request: Any) -> dict[str, Any]:
    return {name: getattr(request, name) for name in ("page_size", "page_token", "filter", "order_by")}


def _page(request: pb.ListDatasetsRequest | pb.ListRevisionsRequest) -> dict[str, Any]:
    return {**_paging(request), "orders": ("name", "create_time")}


def _time(text: str) -> timestamp_pb2.Timestamp | None:
    if not text:
        return None
    found = timestamp_pb2.Timestamp()
    found.FromJsonString(text)
    return found


def _dataset(d: usecases.Dataset) -> pb.Dataset:
    return pb.Dataset(
        name=d.name,
        display_name=d.display_name,
        labels=d.labels,
        latest_revision=d.latest_revision,
        create_time=_time(d.create_time),
        etag=d.etag,
    )


def _status(s: UploadStatus) -> pb.BlobStatus:
    return pb.BlobStatus(
        upload=s.upload,
        digest=s.digest,
        size_bytes=s.size,
        committed_bytes=s.committed,
        complete=s.complete,
        links=[pb.UploadLink(offset_bytes=k.offset, size_bytes=k.size, url=k.url) for k in s.links],
    )


def _revision(r: usecases.Revision) -> pb.Revision:
    meta = r.manifest.meta
    return pb.Revision(
        name=r.name,
        digest=r.digest,
        format=meta["format"],
        format_reason=r.format_reason,
        row_count=meta["rows"],
        size_bytes=r.manifest.size,
        files=[_file(f) for f in r.manifest.files],
        skipped_row_count=meta["skipped_rows"],
        skipped_rows=[pb.RowProblem(**p) for p in meta["skipped"]],
        create_time=_time(r.create_time),
        columns=meta.get("columns"),
    )


def _file(f: File) -> pb.RevisionFile:
    return pb.RevisionFile(path=f.path, digest=f.digest, size_bytes=f.size)


def _diff(name: str, base: str, d: Diff) -> pb.DiffRevisionsResponse:
    changed = [
        pb.RowChange(file=a.file, row=a.row, text=a.text, base_file=b.file, base_row=b.row, base_text=b.text)
        for a, b in d.changed_rows
    ]
    kinds = Counter("added" if not old else "changed" if new else "removed" for _, new, old in d.files)
    return pb.DiffRevisionsResponse(
        name=name,
        base=base,
        added_row_count=d.added,
        removed_row_count=d.removed,
        changed_row_count=d.changed,
        unchanged_row_count=d.unchanged,
        added_rows=[pb.RowChange(file=p.file, row=p.row, text=p.text) for p in d.added_rows],
        removed_rows=[pb.RowChange(base_file=p.file, base_row=p.row, base_text=p.text) for p in d.removed_rows],
        changed_rows=changed,
        added_file_count=kinds["added"],
        removed_file_count=kinds["removed"],
        changed_file_count=kinds["changed"],
        files=[pb.FileChange(path=p, digest=new, base_digest=old) for p, new, old in d.files[:SHOWN]],
    )


def _row(s: Shown) -> pb.PreviewRow:
    return pb.PreviewRow(
        file=s.row.file,
        row=s.row.row,
        pieces=[pb.Piece(text=text, trained=trained) for text, trained in s.pieces],
        token_ids=s.ids,
        loss_mask=s.mask,
        truncated_tokens=s.truncated,
    )
