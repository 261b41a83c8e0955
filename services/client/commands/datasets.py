"""dataset, list-dataset-format, assistant."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path, PurePosixPath
from typing import Any

from quartet.datasets.v1 import datasets_pb2

from services.client.assistant import assistant_rows, plain_rows
from services.client.client import Client, Progress
from services.client.commands import connect, readable, short_name
from services.client.retry import pages
from services.client.show import bar, out, plain, table
from services.finetune.errors import InvalidArgument, QuartetError
from services.finetune.formats import Reading
from services.finetune.formats.containers import is_row_file


def create(a: Namespace) -> None:
    """A revision of files, folders and archives, or of what the service fetches itself by reference."""
    references = {kind: text for kind, text in {"hub_id": a.hub, "s3_uri": a.s3}.items() if text}
    if a.include and not references:
        raise InvalidArgument("--include goes with --hub or --s3", reason="ARGUMENT_INVALID")
    with connect(a) as client, bar("fetching" if references else "uploading", a.json) as told:
        if references:
            revision = client.import_dataset(a.dataset, references, a.include, _reading(a), told)
        else:
            revision = _create_of_files(client, a, told)
    _show_revision(revision, a.json)


def _create_of_files(client: Client, a: Namespace, told: Progress) -> datasets_pb2.Revision:
    """One folder of a machine that we share with the service is read where it is; all else is uploaded."""
    paths = [Path(f).expanduser() for f in a.files]
    if len(paths) == 1 and paths[0].is_dir() and client.is_local("datasets"):
        here = {"directory": str(paths[0].resolve())}
        try:
            return client.import_dataset(a.dataset, here, (), _reading(a), told)
        except QuartetError as error:
            # On loopback, yet it may not or cannot see our files, as in a container: bring them.
            if error.reason not in ("LOCAL_PATH_FORBIDDEN", "SOURCE_NOT_FOUND"):
                raise
    return client.upload_dataset(a.dataset, paths, _reading(a), told)


def _reading(a: Namespace) -> Reading:
    columns = dict(pair.partition("=")[::2] for pair in a.column)
    if not all(columns) or not all(columns.values()):
        raise InvalidArgument("--column: write FIELD=COLUMN, as instruction=question", reason="ARGUMENT_INVALID")
    return Reading(a.format, columns, a.skip_bad_rows)


def diff(a: Namespace) -> None:
    with connect(a) as client:
        base = client.revision(a.base) if a.base else ""
        request = datasets_pb2.DiffRevisionsRequest(name=client.revision(a.dataset), base=base)
        found = client.datasets.DiffRevisions(request)
    if a.json:
        out(plain(found))
        return
    print(f"{found.base} -> {found.name}")
    for file in found.files:
        print(f"  {'+' if not file.base_digest else '~' if file.digest else '-'} {file.path}")
    print(
        f"rows: {found.added_row_count} added, {found.removed_row_count} removed, {found.changed_row_count} changed, "
        f"{found.unchanged_row_count} unchanged"
    )
    for mark, rows in (("+", found.added_rows), ("-", found.removed_rows), ("~", found.changed_rows)):
        for row in rows[:10]:
            print(f"  {mark} {row.file or row.base_file}:{row.row or row.base_row} {(row.text or row.base_text)[:160]}")


def list_all(a: Namespace) -> None:
    if a.dataset:
        _list_revisions(a)
        return
    with connect(a) as client:
        request = datasets_pb2.ListDatasetsRequest(parent=client.parent)
        found = list(pages(client.datasets.ListDatasets, request, "datasets"))
    if a.json:
        out({"datasets": [plain(d) for d in found]})
        return
    table(["dataset", "latest revision"], [(d.name, d.latest_revision.rpartition("/")[2]) for d in found])


def _list_revisions(a: Namespace) -> None:
    with connect(a) as client:
        request = datasets_pb2.ListRevisionsRequest(parent=client.name("datasets", a.dataset))
        found = list(pages(client.datasets.ListRevisions, request, "revisions"))
    if a.json:
        out({"revisions": [plain(r) for r in found]})
        return
    rows = [
        (r.name, r.row_count, len(r.files), f"{r.size_bytes / 1e6:.1f}", r.create_time.ToJsonString()) for r in found
    ]
    table(["revision", "rows", "files", "MB", "made"], rows)


def preview(a: Namespace) -> None:
    with connect(a) as client:
        request = datasets_pb2.PreviewRowsRequest(
            name=client.revision(a.dataset),
            model=client.name("models", a.model),
            template=a.template,
            start_row=a.start,
            row_count=a.rows,
            system=a.system,
            max_length=a.max_length,
        )
        found = client.datasets.PreviewRows(request)
    if a.json:
        out(plain(found))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for row in found.rows:
        learned = sum(row.loss_mask)
        console.rule(Text(f"{row.file} row {row.row}: {len(row.token_ids)} tokens, {learned} learned"), align="left")
        shown = Text()
        for piece in row.pieces:
            shown.append(piece.text, style="bold green" if piece.trained else "dim")
        console.print(shown)


def repeat(a: Namespace) -> None:
    """A .json or .jsonl file into another; a dataset into a revision of `--output`, without moving bytes."""
    if a.n < 1:
        raise InvalidArgument("-n must be at least 1", reason="ARGUMENT_INVALID")
    given = a.input or a.source
    if Path(given).suffix in (".json", ".jsonl") or Path(given).is_file():
        count = repeat_file(readable(given), Path(a.output), a.n)
        out({"rows": count, "output": a.output}) if a.json else print(f"{count} rows in {a.output}")
        return
    with connect(a) as client:
        revision = _repeat_revision(client, client.revision(given), a.output, a.n)
    _show_revision(revision, a.json)


def repeat_file(source: Path, target: Path, times: int) -> int:
    """Write the rows of `source` so many times, in order; how many rows there are now.

    InvalidArgument (JSON_INVALID, ROW_NOT_OBJECT).
    """
    try:
        text = source.read_text("utf-8-sig")
        if source.suffix == ".jsonl":
            lines = [line for line in text.split("\n") if line.strip()]
            for line in lines:
                json.loads(line)
            target.write_text("".join(f"{line}\n" for line in lines * times), "utf-8")
            return len(lines) * times
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise InvalidArgument(f"{source} holds no list of rows", reason="ROW_NOT_OBJECT")
        target.write_text(json.dumps(rows * times, ensure_ascii=False, indent=4), "utf-8")
        return len(rows) * times
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidArgument(f"{source} cannot be read: {error}", reason="JSON_INVALID") from error


def _repeat_revision(client: Client, name: str, target: str, times: int) -> datasets_pb2.Revision:
    source = client.datasets.GetRevision(datasets_pb2.GetRevisionRequest(name=name))
    digits = len(str(times))
    # A folder below that of the rows: what they name beside them, as images, need not be listed again to be found.
    files = [
        datasets_pb2.RevisionFile(path=str(path.parent / f"repeat-{n:0{digits}d}" / path.name), digest=file.digest)
        for n in range(1, times + 1)
        for file in source.files
        if is_row_file(file.path) and (path := PurePosixPath(file.path))
    ]
    files += [file for file in source.files if not is_row_file(file.path)]
    # Rows that the source left out are left out of each repetition.
    reading = Reading(source.format, dict(source.columns), skip_bad_rows=source.skipped_row_count > 0)
    return client.commit_files(target, files, reading)


def formats(a: Namespace) -> None:
    with connect(a) as client:
        found = client.datasets.ListFormats(datasets_pb2.ListFormatsRequest())
    if a.json:
        out(plain(found))
        return
    table(["format", "fields"], [(f.name, f.description) for f in found.formats])


def assistant(a: Namespace) -> None:
    if a.rows < 1 or not a.name.strip():
        raise InvalidArgument("--rows must be at least 1, and --name not empty", reason="ARGUMENT_INVALID")
    if a.plain and a.mix:
        raise InvalidArgument("--plain is one question only: leave --mix out", reason="ARGUMENT_INVALID")
    mix = _read_mix(readable(a.mix)) if a.mix else []
    rows = plain_rows(a.name, a.rows) if a.plain else assistant_rows(a.name, a.rows, a.seed, mix)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if a.output:
        Path(a.output).write_text(text, "utf-8")
        out({"rows": len(rows), "output": a.output}) if a.json else print(f"{len(rows)} rows in {a.output}")
        return
    with tempfile.TemporaryDirectory() as folder, connect(a) as client:
        path = Path(folder) / "assistant.jsonl"
        path.write_text(text, "utf-8")
        revision = client.upload_dataset(a.dataset or short_name(a.name) or "assistant", [path], Reading("openai"))
    _show_revision(revision, a.json)


def _read_mix(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file in the openai format; the datasets service checks what is inside."""
    rows: list[dict[str, Any]] = []
    try:
        for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict) or "messages" not in row:
                raise InvalidArgument(
                    f'--mix: line {number} of {path} is no row of the form {{"messages": […]}}', reason="MIX_INVALID"
                )
            rows.append(row)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidArgument(f"--mix: {path} cannot be read: {error}", reason="MIX_INVALID") from error
    if not rows:
        raise InvalidArgument(f"--mix: {path} holds no rows", reason="MIX_INVALID")
    return rows


def _show_revision(revision: datasets_pb2.Revision, as_json: bool) -> None:
    if as_json:
        out(plain(revision))
        return
    print(f"{revision.name}: {revision.row_count} rows, {revision.format} ({revision.format_reason})")
    for problem in revision.skipped_rows:
        print(f"left out {problem.file} row {problem.row} {problem.field}: {problem.message}", file=sys.stderr)
    if revision.skipped_row_count > len(revision.skipped_rows):
        print(f"left out {revision.skipped_row_count} rows in all", file=sys.stderr)
