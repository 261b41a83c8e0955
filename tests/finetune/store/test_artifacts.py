"""Artifacts and refs, on both stores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.finetune.errors import Aborted, DataLoss, InvalidArgument, NotFound
from services.finetune.store import Store, artifacts, open_store
from services.finetune.store.artifacts import File, Manifest, Parent


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    (made / "sub").mkdir(parents=True)
    (made / "config.json").write_text('{"a": 1}')
    (made / "sub" / "größe.bin").write_bytes(bytes(range(256)))
    return made


def test_folder_comes_back(store_uri: str, folder: Path, tmp_path: Path) -> None:
    parents = (Parent("dataset", "sha256:" + "0" * 64, "workspaces/w/datasets/d/revisions/r"),)
    digest = artifacts.publish_directory(open_store(store_uri), "adapter", folder, parents, {"step": 3})
    store = open_store(store_uri)
    manifest = artifacts.load(store, digest)
    assert (manifest.kind, manifest.parents, manifest.meta, manifest.size) == ("adapter", parents, {"step": 3}, 264)
    assert [f.path for f in manifest.files] == ["config.json", "sub/größe.bin"]
    out = artifacts.materialise(store, manifest, tmp_path / "out")
    for f in manifest.files:
        assert (out / f.path).read_bytes() == (folder / f.path).read_bytes()
    assert artifacts.read_file(store, manifest, "config.json") == b'{"a": 1}'
    only = artifacts.materialise(store, manifest, tmp_path / "only", paths=["config.json"])
    assert [p.name for p in only.rglob("*")] == ["config.json"]
    with pytest.raises(NotFound) as error:
        artifacts.read_file(store, manifest, "absent")
    assert error.value.reason == "FILE_NOT_FOUND"


def test_equal_content_has_the_equal_digest(store: Store, folder: Path) -> None:
    first = artifacts.publish_directory(store, "base", folder)
    assert artifacts.publish_directory(store, "base", folder) == first
    assert artifacts.publish_directory(store, "merged", folder) != first
    (folder / "config.json").write_text('{"a": 2}')
    assert artifacts.publish_directory(store, "base", folder) != first


def test_manifest_is_refused_while_a_blob_is_missing(store: Store) -> None:
    missing = Manifest("base", (File("a", "sha256:" + "1" * 64, 1),))
    with pytest.raises(InvalidArgument) as error:
        artifacts.publish(store, missing)
    assert error.value.reason == "BLOB_MISSING" and store.list("manifests/") == []


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "./a", "a/", "c:\\x", "a\x00b", "a\nb", "x" * 513]
)
def test_unsafe_paths(file_store: Store, tmp_path: Path, path: str) -> None:
    blob = file_store.put_blob(b"1")
    unsafe = Manifest("base", (File(path, blob.digest, 1),))
    with pytest.raises(InvalidArgument) as error:
        artifacts.publish(file_store, unsafe)
    assert error.value.reason == "PATH_UNSAFE"
    # A manifest that came into the store some other way must not write outside either.
    with pytest.raises(InvalidArgument):
        artifacts.materialise(file_store, unsafe, tmp_path / "out" / "deep")


def test_damaged_manifest(store: Store, folder: Path) -> None:
    digest = artifacts.publish_directory(store, "base", folder)
    key = f"manifests/{digest[7:]}.json"
    found = store.get(key)
    assert found is not None
    store.put(key, found.data.replace(b'"base"', b'"merged"'))
    with pytest.raises(DataLoss) as error:
        artifacts.load(store, digest)
    assert error.value.reason == "MANIFEST_CORRUPT"
    with pytest.raises(NotFound) as gone:
        artifacts.load(store, "sha256:" + "2" * 64)
    assert gone.value.reason == "ARTIFACT_NOT_FOUND"


def test_damaged_blob(file_store: Store, folder: Path, tmp_path: Path) -> None:
    manifest = artifacts.load(file_store, artifacts.publish_directory(file_store, "base", folder))
    blob = next((tmp_path / "store" / "blobs").rglob(manifest.file("config.json").digest[7:]))
    blob.chmod(0o644)
    blob.write_bytes(b'{"a": 7}')
    for read in (
        lambda: artifacts.read_file(file_store, manifest, "config.json"),
        lambda: artifacts.materialise(file_store, manifest, tmp_path / "out"),
    ):
        with pytest.raises(DataLoss) as error:
            read()
        assert error.value.reason == "BLOB_CORRUPT"
    # The other file is sound, and one can still have it.
    artifacts.materialise(file_store, manifest, tmp_path / "out", paths=["sub/größe.bin"])


def test_refs(store: Store) -> None:
    name = "workspaces/w/models/m"
    assert artifacts.get_ref(store, name) is None
    made = artifacts.put_ref(store, name, {"digest": "sha256:x", "labels": {"é": "1"}}, if_absent=True)
    assert artifacts.get_ref(store, name) == made
    with pytest.raises(Aborted):
        artifacts.put_ref(store, name, {}, if_absent=True)
    changed = artifacts.put_ref(store, name, {"digest": "sha256:y"}, if_match=made.etag)
    for stale in (
        lambda: artifacts.put_ref(store, name, {}, if_match=made.etag),
        lambda: artifacts.delete_ref(store, name, if_match=made.etag),
    ):
        with pytest.raises(Aborted):
            stale()
    found = artifacts.get_ref(store, name)
    assert found is not None and found.body == {"digest": "sha256:y"}
    artifacts.delete_ref(store, name, if_match=changed.etag)
    assert artifacts.get_ref(store, name) is None


def test_refs_are_listed_without_those_below_them(store: Store) -> None:
    below = "workspaces/w/datasets/"
    for name in ("b", "a", "a-2", "a/revisions/r1", "a-2/revisions/r1"):
        artifacts.put_ref(store, below + name, {"digest": name})
    artifacts.put_ref(store, "workspaces/w/datasetsx/c", {})
    found = [r.name.removeprefix(below) for r in artifacts.list_refs(store, below)]
    assert sorted(found) == ["a", "a-2", "b"] and len(found) == 3
    assert [r.body["digest"] for r in artifacts.list_refs(store, below + "a/revisions/")] == ["a/revisions/r1"]


def test_json_blob(store: Store) -> None:
    blob = artifacts.put_json_blob(store, {"b": 1, "a": "é"})
    assert blob == artifacts.put_json_blob(store, {"a": "é", "b": 1})
    assert json.loads(b"".join(store.read_blob(blob.digest))) == {"a": "é", "b": 1}
