"""Archives and paths of every bad kind: each is blamed, nothing is made, and neither time nor memory grows."""

from __future__ import annotations

import gzip
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from quartet.datasets.v1 import datasets_pb2 as pb
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

from services.common.status import STATUS_METADATA
from services.finetune.errors import InvalidArgument
from tests.common.serving import refused
from tests.datasets import crafted
from tests.datasets.conftest import Service
from tests.datasets.crafted import ROWS, linked, named, tarred, zipped
from tests.datasets.wire import commit, new, row, upload

MOST_S, MOST_MIB = 20.0, 160

UNSAFE: list[tuple[str, str, Callable[[], bytes], str, str]] = [
    ("parent folder", "a.zip", lambda: zipped(("../a.jsonl", ROWS)), "PATH_UNSAFE", ".members[../a.jsonl]"),
    ("parent folder within", "a.zip", lambda: zipped(("b/../../a.jsonl", ROWS)), "PATH_UNSAFE", ".members[b/../../"),
    ("absolute", "a.zip", lambda: zipped(("/etc/a.jsonl", ROWS)), "PATH_UNSAFE", ".members[/etc"),
    ("drive letter", "a.zip", lambda: zipped(("C:\\a.jsonl", ROWS)), "PATH_UNSAFE", ".members[C:"),
    ("backslash", "a.zip", lambda: zipped(("b\\..\\a.jsonl", ROWS)), "PATH_UNSAFE", ".members[b"),
    ("NUL", "a.zip", lambda: named(b"a.jsonl\0.png"), "PATH_UNSAFE", ".members[a.jsonl"),
    ("line break", "a.zip", lambda: zipped(("a\n.jsonl", ROWS)), "PATH_UNSAFE", ".members[a"),
    ("unicode dots", "a.zip", lambda: zipped(("\u2025/a.jsonl", ROWS)), "PATH_UNSAFE", ".members[\u2025/"),
    ("unicode slash", "a.zip", lambda: zipped(("..\uff0fa.jsonl", ROWS)), "PATH_UNSAFE", ".members[.."),
    ("dot at the end", "a.zip", lambda: zipped(("b./a.jsonl", ROWS)), "PATH_UNSAFE", ".members[b./"),
    ("very long", "a.zip", lambda: zipped(("b" * 600 + ".jsonl", ROWS)), "PATH_UNSAFE", ".members[bbb"),
    ("long part", "a.zip", lambda: zipped(("\u00e4" * 200 + ".jsonl", ROWS)), "PATH_UNSAFE", ".members[\u00e4"),
    ("link", "a.zip", lambda: zipped(("a", b"/etc/passwd"), mode=0o120777), "ARCHIVE_UNSAFE", ".members[a]"),
    ("device", "a.zip", lambda: zipped(("a", b""), mode=0o020666), "ARCHIVE_UNSAFE", ".members[a]"),
    ("encrypted", "a.zip", crafted.encrypted, "ARCHIVE_INVALID", ".members[a.jsonl]"),
    ("overlapping", "a.zip", crafted.overlapping, "ARCHIVE_UNSAFE", ".members[b.jsonl]"),
    ("sizes that lie", "a.zip", lambda: crafted.lying(5), "ARCHIVE_INVALID", "files[a.zip]"),
    ("bomb", "a.zip", lambda: crafted.inflated(80 << 20), "ARCHIVE_TOO_LARGE", ".members[a.jsonl]"),
    ("long directory", "a.zip", lambda: crafted.long_directory(100_000), "ARCHIVE_TOO_LARGE", "files[a.zip]"),
    (
        "many members",
        "a.zip",
        lambda: crafted.many([f"{n}" for n in range(20_001)]),
        "ARCHIVE_TOO_LARGE",
        "files[a.zip]",
    ),
    ("nested", "a.zip", lambda: zipped(("b.zip", zipped(("a.jsonl", ROWS)))), "ARCHIVE_UNSAFE", ".members[b.zip]"),
    ("case collision", "a.zip", lambda: zipped(("A.jsonl", ROWS), ("a.JSONL", ROWS)), "PATH_UNSAFE", "files[a.JSONL]"),
    ("twice", "a.tar", lambda: tarred(("a.jsonl", ROWS), ("a.jsonl", ROWS)), "PATH_UNSAFE", "files[a.jsonl]"),
    ("file and folder", "a.tar", lambda: tarred(("a.jsonl", ROWS), ("a.jsonl/b.jsonl", ROWS)), "PATH_UNSAFE", "files["),
    ("no zip", "a.zip", lambda: ROWS, "ARCHIVE_INVALID", "files[a.zip]"),
    ("empty", "a.zip", lambda: b"", "ARCHIVE_INVALID", "files[a.zip]"),
    ("cut off", "a.zip", lambda: zipped(("a.jsonl", ROWS))[:-30], "ARCHIVE_INVALID", "files[a.zip]"),
    ("damaged", "a.zip", lambda: crafted.damaged(zipped(("a.jsonl", ROWS))), "ARCHIVE_INVALID", "files[a.zip]"),
    ("parent folder", "a.tar", lambda: tarred(("../a.jsonl", ROWS)), "PATH_UNSAFE", ".members[../a.jsonl]"),
    ("absolute", "a.tar", lambda: tarred(("/a.jsonl", ROWS)), "PATH_UNSAFE", ".members[/a.jsonl]"),
    ("no UTF-8", "a.tar", lambda: tarred(("a\udcff.jsonl", ROWS)), "PATH_UNSAFE", ".members[a"),
    ("symlink", "a.tar", lambda: linked(tarfile.SYMTYPE, "/etc/passwd"), "ARCHIVE_UNSAFE", ".members[evil]"),
    ("hard link", "a.tar", lambda: linked(tarfile.LNKTYPE, "a.jsonl"), "ARCHIVE_UNSAFE", ".members[evil]"),
    ("device", "a.tar", lambda: linked(tarfile.CHRTYPE, ""), "ARCHIVE_UNSAFE", ".members[evil]"),
    ("pipe", "a.tar", lambda: linked(tarfile.FIFOTYPE, ""), "ARCHIVE_UNSAFE", ".members[evil]"),
    ("sparse", "a.tar", lambda: linked(tarfile.GNUTYPE_SPARSE, ""), "ARCHIVE_UNSAFE", ".members[evil]"),
    ("nested", "a.tar", lambda: tarred(("b.tgz", b"x")), "ARCHIVE_UNSAFE", ".members[b.tgz]"),
    ("cut off", "a.tar", lambda: tarred(("a.jsonl", ROWS * 99))[:3000], "ARCHIVE_INVALID", "files[a.tar]"),
    ("no tar", "a.tar", lambda: ROWS * 9, "ARCHIVE_INVALID", "files[a.tar]"),
    ("no gzip", "a.tar.gz", lambda: tarred(("a.jsonl", ROWS)), "ARCHIVE_INVALID", "files[a.tar.gz]"),
    ("cut off", "a.tgz", lambda: gzip.compress(tarred(("a.jsonl", ROWS)))[:-20], "ARCHIVE_INVALID", "files[a.tgz]"),
    ("bomb", "a.tgz", lambda: crafted.bomb(80 << 20), "ARCHIVE_TOO_LARGE", "files[a.tgz]"),
    ("long header", "a.tgz", lambda: crafted.long_header(40 << 20), "ARCHIVE_UNSAFE", "files[a.tgz]"),
    ("kind not read", "a.tar.xz", lambda: b"x", "ARCHIVE_UNSUPPORTED", "files[a.tar.xz]"),
]


def rss_mib(service: Service, what: str = "VmRSS:") -> float:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(what))


@pytest.mark.parametrize(
    ("case", "name", "data", "reason", "field"), UNSAFE, ids=[f"{name} {case}" for case, name, *_ in UNSAFE]
)
def test_bad_archives_are_blamed_and_nothing_is_made(
    service: Service, case: str, name: str, data: Callable[[], bytes], reason: str, field: str
) -> None:
    datasets, parent = service.stub, new(service.stub)
    digest = upload(datasets, parent, data())
    before, began = rss_mib(service), time.monotonic()
    wanted = pb.CommitRevisionRequest(parent=parent, files=[pb.RevisionFile(path=name, digest=digest)])
    with refused(InvalidArgument, reason) as errors:
        datasets.CommitRevision(wanted, metadata=STATUS_METADATA)
    assert time.monotonic() - began < MOST_S and rss_mib(service) - before < MOST_MIB
    assert any(field in v.field for v in errors[0].violations), errors[0].to_json()
    assert not datasets.GetDataset(pb.GetDatasetRequest(name=parent)).latest_revision
    assert not list((service.home / "tmp" / "datasets").iterdir())


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.Codec("zstd").compress(data).to_pybytes()
    return packed


GOOD: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("a.zip", lambda d: zipped(("train.jsonl", d), ("images/a.png", b"1"))),
    ("a.tar", lambda d: tarred(("./train.jsonl", d), ("./images/a.png", b"1"))),
    ("a.tar.gz", lambda d: gzip.compress(tarred(("train.jsonl", d), ("images/a.png", b"1")))),
    ("a.tar.zst", lambda d: zstd(tarred(("train.jsonl", d), ("images/a.png", b"1")))),
]


@pytest.mark.parametrize(("name", "pack"), GOOD, ids=[name for name, _ in GOOD])
def test_archives_are_unpacked_beside_themselves(datasets: DatasetsStub, name: str, pack: object) -> None:
    data = row(answer="x" * 9000) * 1000  # more than is held in memory
    assert callable(pack)
    made = commit(datasets, new(datasets), {f"sub/{name}": pack(data)})
    assert {f.path: f.size_bytes for f in made.files} == {"sub/train.jsonl": len(data), "sub/images/a.png": 1}
    assert (made.row_count, made.format) == (1000, "openai")


def test_archives_are_files_where_files_are_kept_unread(datasets: DatasetsStub) -> None:
    parent = new(datasets)
    made = commit(datasets, parent, {"a.zip": b"no zip at all", "a.json": b"{}"}, format="files")
    assert [f.path for f in made.files] == ["a.zip", "a.json"]
    commit(datasets, parent, {"a.json": b"[]"}, format="files")
    found = datasets.DiffRevisions(pb.DiffRevisionsRequest(name=f"{parent}/revisions/latest"))
    assert (found.removed_file_count, found.changed_file_count, found.changed_row_count) == (1, 1, 0)


PATHS = [
    ("../a.jsonl", "PATH_UNSAFE"),
    ("/a.jsonl", "PATH_UNSAFE"),
    ("C:\\a.jsonl", "PATH_UNSAFE"),
    ("C:a.jsonl", "PATH_UNSAFE"),
    ("a\0.jsonl", "PATH_UNSAFE"),
    ("\u2025/a.jsonl", "PATH_UNSAFE"),
    ("a/b./c.jsonl", "PATH_UNSAFE"),
    ("a /c.jsonl", "PATH_UNSAFE"),
    ("a" * 600, "PATH_UNSAFE"),
    ("a/" + "b" * 300 + ".jsonl", "PATH_UNSAFE"),
]


@pytest.mark.parametrize(("path", "reason"), PATHS, ids=[ascii(p)[:20] for p, _ in PATHS])
def test_bad_paths_are_refused(datasets: DatasetsStub, path: str, reason: str) -> None:
    with refused(InvalidArgument, reason):
        commit(datasets, new(datasets), {path: row()})


def test_paths_that_one_disk_cannot_hold_are_refused(datasets: DatasetsStub) -> None:
    with refused(InvalidArgument, "PATH_UNSAFE") as errors:
        commit(datasets, new(datasets), {"Train.jsonl": row(), "train.JSONL": row("x")})
    assert "case only" in errors[0].message
    digest = upload(datasets, parent := new(datasets), row())
    files = [pb.RevisionFile(path=f"{n}.jsonl", digest=digest) for n in range(20_001)]
    with refused(InvalidArgument, "TOO_MANY_FILES"):
        datasets.CommitRevision(pb.CommitRevisionRequest(parent=parent, files=files))


def test_paths_in_any_language_are_kept(datasets: DatasetsStub) -> None:
    names = ["größe.jsonl", "数据：一.jsonl", "%2e%2e.jsonl"]
    made = commit(datasets, new(datasets), {name: row(name) for name in names})
    assert [f.path for f in made.files] == names


LLAVA = b'{"image": %s, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


def test_images_beside_rows_are_carried_and_must_be_there(datasets: DatasetsStub) -> None:
    parent = new(datasets)
    files = {"data/x/a.jsonl": LLAVA % b'"../images/1.png"'}
    with refused(InvalidArgument, "ROWS_INVALID"):
        commit(datasets, parent, {**files, "data/images/1.png": b"1"})
    files = {"data/a.jsonl": LLAVA % b'"images/1.png"' + LLAVA % b'"all/2.png"' + row()}
    files |= {"data/images/1.png": b"1", "all/2.png": b"2", "README.md": b"#"}
    made = commit(datasets, parent, files)
    assert made.row_count == 3 and len(made.files) == 4
    bad = LLAVA % b'"images/3.png"' + LLAVA % b'["images/1.png", "../x.png"]' + LLAVA % b'"/etc/passwd"'
    with refused(InvalidArgument, "ROWS_INVALID") as errors:
        commit(datasets, parent, {**files, "data/a.jsonl": bad})
    assert [(v.field, v.reason) for v in errors[0].violations] == [
        ("files[data/a.jsonl].rows[1].image", "IMAGE_MISSING"),
        ("files[data/a.jsonl].rows[2].image[1]", "PATH_UNSAFE"),
        ("files[data/a.jsonl].rows[3].image", "PATH_UNSAFE"),
    ]
    skipped = commit(datasets, parent, {**files, "data/a.jsonl": bad + row()}, bad_rows=2)
    assert (skipped.row_count, skipped.skipped_row_count) == (1, 3)


def test_packed_text_and_columns_are_rows(datasets: DatasetsStub) -> None:
    head = b"instruction\toutput\n"
    table = pyarrow.Table.from_pylist([{"instruction": "q", "output": "a"}] * 5)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    arrow = sink.getvalue().to_pybytes()
    alpaca = b'{"instruction": "q", "output": "a"}\n'
    files = {"a.jsonl.gz": gzip.compress(alpaca * 3), "b.jsonl.zst": zstd(alpaca * 2), "c.tsv": head + b"q\ta\n"}
    made = commit(datasets, new(datasets), {**files, "d.arrow": arrow, "dataset_info.json": b"{}"})
    assert (made.row_count, made.format) == (11, "alpaca")
