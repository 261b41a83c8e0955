"""What changed between revisions, and how little is sent for it."""

from __future__ import annotations

import io
import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quartet.datasets.v1 import datasets_pb2 as pb
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

from services.datasets.diff import _compare, _Side
from services.finetune.errors import FailedPrecondition, InvalidArgument, NotFound
from services.finetune.store import delta
from tests.common.serving import refused
from tests.datasets.wire import begin, commit, new, row, sha256, upload


def rows(*questions: object) -> bytes:
    return b"".join(row(f"q{q}") for q in questions)


def test_rows_added_removed_changed(datasets: DatasetsStub) -> None:
    parent = new(datasets)
    old = commit(datasets, parent, {"a.jsonl": rows(*range(10)), "b.jsonl": rows("b"), "gone.jsonl": rows("x", "y")})
    files = {
        "a.jsonl": rows("new", 0, 1, 2, "3!", 4, 6, 7, 8, 9, 9),
        "b.jsonl": rows("b"),
        "moved.jsonl": rows("x", "y"),
    }
    made = commit(datasets, parent, {**files, "pic.png": b"1"})
    found = datasets.DiffRevisions(pb.DiffRevisionsRequest(name=made.name))
    assert (found.name, found.base) == (made.name, old.name)
    counts = (found.added_row_count, found.removed_row_count, found.changed_row_count, found.unchanged_row_count)
    assert counts == (2, 1, 1, 11)
    assert [(r.file, r.row, r.base_row) for r in found.changed_rows] == [("a.jsonl", 5, 4)]
    assert "q3!" in found.changed_rows[0].text and "q3!" not in found.changed_rows[0].base_text
    assert [r.row for r in found.added_rows] == [1, 11] and "qnew" in found.added_rows[0].text
    assert [(r.base_file, r.base_row) for r in found.removed_rows] == [("a.jsonl", 6)]
    changes = {f.path: (bool(f.digest), bool(f.base_digest)) for f in found.files}
    assert changes == {
        "a.jsonl": (True, True),
        "gone.jsonl": (False, True),
        "moved.jsonl": (True, False),
        "pic.png": (True, False),
    }
    assert (found.added_file_count, found.removed_file_count, found.changed_file_count) == (2, 1, 1)
    back = datasets.DiffRevisions(pb.DiffRevisionsRequest(name=old.name, base=made.name))
    assert (back.added_row_count, back.removed_row_count, back.changed_row_count) == (1, 2, 1)


def test_containers_do_not_matter_and_only_the_first_hundred_are_shown(datasets: DatasetsStub) -> None:
    parent = new(datasets)
    turns = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "a"}]} for n in range(250)
    ]
    lines = "".join(json.dumps(t) + "\n" for t in turns)
    commit(datasets, parent, {"a.jsonl": lines.encode()})
    array = commit(datasets, parent, {"a.json": json.dumps(turns, indent=1).encode()})
    found = datasets.DiffRevisions(pb.DiffRevisionsRequest(name=array.name))
    assert found.unchanged_row_count == 250 and not (found.added_row_count or found.removed_row_count)
    one = commit(datasets, parent, {"a.json": rows("one")})
    found = datasets.DiffRevisions(pb.DiffRevisionsRequest(name=one.name))
    assert (found.changed_row_count, found.removed_row_count, len(found.removed_rows)) == (1, 249, 100)


def test_what_cannot_be_compared(datasets: DatasetsStub) -> None:
    parent = new(datasets)
    first = commit(datasets, parent, {"a.jsonl": row()})
    for wanted in (
        pb.DiffRevisionsRequest(name=first.name),
        pb.DiffRevisionsRequest(name=first.name, base=f"{first.name}x"),
    ):
        with refused(NotFound, "REVISION_NOT_FOUND"):
            datasets.DiffRevisions(wanted)


def side(hashes: list[int]) -> _Side:
    made = _Side(["a"], [len(hashes)])
    for n, value in enumerate(hashes, 1):
        made.hashes += value.to_bytes(8, "little")
        made.numbers += n.to_bytes(8, "little")
    return made


values = st.lists(st.integers(0, 6), max_size=14)


@given(new=values, old=values)
@settings(deadline=None)
def test_every_row_is_accounted_for_once(new: list[int], old: list[int]) -> None:
    pairs, added, removed = _compare(side(new), side(old))
    ours, theirs = {a for a, _ in pairs} | set(added), {b for _, b in pairs} | set(removed)
    assert len(ours) == len(pairs) + len(added) and len(theirs) == len(pairs) + len(removed)
    same = Counter(new) & Counter(old)
    assert Counter(v for n, v in enumerate(new) if n not in ours) == same
    assert Counter(v for n, v in enumerate(old) if n not in theirs) == same


# ---- deltas ----


def compose(parent: str, base: pb.Revision, new_data: bytes, change: str, **more: str) -> pb.ComposeBlobRequest:
    path = more.get("base_path", "a.jsonl")
    return pb.ComposeBlobRequest(
        parent=parent,
        digest=more.get("digest", sha256(new_data)),
        size_bytes=len(new_data),
        base_revision=more.get("base_revision", base.name),
        base_path=path,
        delta=change,
    )


def delta_to(datasets: DatasetsStub, base: pb.Revision, data: bytes) -> bytes:
    told = datasets.GetFileSignature(pb.GetFileSignatureRequest(name=base.name, path="a.jsonl"))
    out = io.BytesIO()
    delta.write_delta(delta.Signature(told.chunk_bytes, told.chunks), io.BytesIO(data), out)
    return out.getvalue()


def test_a_file_is_made_of_an_older_one_and_a_delta(datasets: DatasetsStub) -> None:
    parent = new(datasets)
    old = commit(datasets, parent, {"a.jsonl": rows(*range(5000))})
    data = rows(*range(2000), "new", *range(2001, 5000))
    begun = begin(datasets, parent, data)  # what was announced before is settled by it
    change = delta_to(datasets, old, data)
    assert len(change) < 1000
    asked = compose(parent, old, data, upload(datasets, parent, change))
    assert datasets.ComposeBlob(asked) == datasets.ComposeBlob(asked)
    status = datasets.GetBlobStatus(pb.GetBlobStatusRequest(upload=begun.upload))
    assert status.complete and status.committed_bytes == len(data)
    assert commit(datasets, parent, {"a.jsonl": data}).row_count == 5000


def test_deltas_that_lie_are_refused_and_nothing_is_kept(datasets: DatasetsStub) -> None:
    parent = new(datasets)
    old = commit(datasets, parent, {"a.jsonl": rows(*range(100))})
    data = rows(*range(99), "x")
    good = upload(datasets, parent, delta_to(datasets, old, data))
    with refused(InvalidArgument, "DIGEST_MISMATCH"):
        datasets.ComposeBlob(compose(parent, old, data, good, digest=sha256(b"other")))
    with refused(InvalidArgument, "SIZE_MISMATCH"):
        datasets.ComposeBlob(compose(parent, old, data + b"x", good))
    whole = 1 << 62
    for bad in (
        b"",
        b"QDELTA1\n?",
        b"QDELTA1\nC\1",
        b"QDELTA1\nL" + (9).to_bytes(8, "little") + b"x",
        b"QDELTA1\nC" + (0).to_bytes(8, "little") + (1 << 40).to_bytes(8, "little"),
        b"QDELTA1\nC" + whole.to_bytes(8, "little") + (1).to_bytes(8, "little"),
    ):
        with refused(InvalidArgument, "DELTA_MALFORMED"):
            datasets.ComposeBlob(compose(parent, old, bytes(1 << 20), upload(datasets, parent, bad)))
    with refused(FailedPrecondition, "BLOB_MISSING"):
        datasets.ComposeBlob(compose(parent, old, data, sha256(b"never sent")))
    for more, reason in (
        ({"base_path": "b"}, "FILE_NOT_FOUND"),
        ({"base_revision": f"{old.name}x"}, "REVISION_NOT_FOUND"),
    ):
        with refused(NotFound, reason):
            datasets.ComposeBlob(compose(parent, old, data, good, **more))
    # Another dataset's files are no base: what they hold would show by which deltas succeed.
    with refused(NotFound, "REVISION_NOT_FOUND"):
        datasets.ComposeBlob(compose(new(datasets), old, data, good))


@given(
    old=st.lists(st.binary(max_size=300), max_size=40),
    seed=st.integers(0, 1 << 16),
    cuts=st.integers(1, 5000),
)
@settings(deadline=None)
def test_a_delta_makes_the_new_file_whatever_changed(old: list[bytes], seed: int, cuts: int) -> None:
    dice = random.Random(seed)
    lines = [line for line in old if dice.random() < 0.8] + [dice.choice(old) if old else b"x"]
    dice.shuffle(lines)
    before, after = b"\n".join(old), b"\n".join(lines)
    signature, out = delta.sign(io.BytesIO(before), len(before)), io.BytesIO()
    delta.write_delta(signature, io.BytesIO(after), out)
    out.seek(0)
    assert b"".join(delta.apply(io.BytesIO(before), out)) == after
    whole = list(delta.cut([after], 64))
    assert b"".join(whole) == after
    assert whole == list(delta.cut([after[at : at + cuts] for at in range(0, len(after), cuts)], 64))


@pytest.mark.parametrize("kind", ["contiguous", "scattered"])
def test_a_percent_of_rows_is_a_percent_of_bytes(kind: str) -> None:
    dice = random.Random(7)
    lines = [json.dumps({"text": f"{dice.getrandbits(6000):x}"}).encode() + b"\n" for _ in range(4000)]
    changed = range(1000, 1040) if kind == "contiguous" else dice.sample(range(4000), 40)
    edited = list(lines)
    for n in changed:
        edited[n] = edited[n].replace(b'"text"', b'"Text"')
    before, after, out = b"".join(lines), b"".join(edited), io.BytesIO()
    signature = delta.sign(io.BytesIO(before), len(before))
    delta.write_delta(signature, io.BytesIO(after), out)
    assert len(out.getvalue()) < 0.013 * len(after) and len(signature.chunks) < 0.02 * len(before)
