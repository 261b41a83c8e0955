"""Files that want to run something, lie about themselves, or would eat the machine: none runs, each is refused by name.

The canary of every payload is a folder; it must never be there, and each payload is shown to work where it is let run.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.finetune.convert import unpickle
from services.finetune.convert.pickles import read_tensors
from services.finetune.convert.shards import as_torch
from services.finetune.errors import FailedPrecondition, Internal, InvalidArgument, QuartetError
from services.finetune.formats import Message
from services.finetune.orders import AdapterTask, ArtifactRef, ImportTask
from services.finetune.store import Store
from services.finetune.store.artifacts import load, materialise, publish_directory
from services.finetune.templates import load_template, to_prompt_ids
from services.finetune.tokenizer import Tokenizer
from tests.finetune.convert.conftest import Convert
from tests.finetune.convert.families import CONFIGS, random_weights, write_family
from tests.tiny import tiny_tokenizer

GOLDEN = Path(__file__).parent / "golden"


class Call:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def payloads(canary: Path) -> dict[str, Any]:
    """Objects that make `canary` when they are unpickled."""
    return {
        "os.system": Call(os.system, f"mkdir {canary}"),
        "eval": Call(eval, f"__import__('os').mkdir({str(canary)!r})"),
        "exec": Call(exec, f"import os\nos.mkdir({str(canary)!r})"),
        "subprocess": Call(subprocess.check_call, ["mkdir", str(canary)]),
        "getattr": Call(getattr(os, "mkdir"), str(canary)),  # noqa: B009
        "shutil": Call(shutil.copytree, str(GOLDEN / "zero1.pth"), str(canary)),
    }


def zip_with(
    data: bytes, records: dict[str, bytes] | None = None, compress: bool = False, name: str = "archive"
) -> bytes:
    """A file as torch.save makes it, of a pickle and storages by hand."""
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        archive.writestr(f"{name}/data.pkl", data)
        for key, content in (records or {}).items():
            archive.writestr(f"{name}/{key}", content)
    return buffer.getvalue()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def legacy(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tar(value: Any) -> bytes:
    """The oldest form, by which torch.load(weights_only=True) was once led astray (CVE-2025-32434)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(0) if name != "pickle" else pickle.dumps(value)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def pt2(value: Any) -> bytes:
    return zip_with(b"", {"models/model.json": b"{}", "data/weights/weight_0": pickle.dumps(value)}).replace(
        b"archive/data.pkl", b"archive/version0"
    )


WRAPPERS: dict[str, Callable[[Any], bytes]] = {
    "zip": lambda v: saved({"x": v}),
    "zip, deep": lambda v: saved({"state_dict": {"x": [({"y": v},)]}}),
    "legacy": lambda v: legacy({"x": v}),
    "bare pickle": lambda v: pickle.dumps({"x": v}),
    "protocol 0": lambda v: pickle.dumps({"x": v}, protocol=0),
    "tar": tar,
    "pt2": pt2,
    "zip in zip": lambda v: zip_with(pickle.dumps({"x": torch.Size([1])}), {"data/0": saved(v)}),
}


def refused(data: bytes, path: Path) -> QuartetError:
    """How a weights file with these bytes is refused."""
    path.write_bytes(data)
    with pytest.raises(QuartetError) as caught:
        read_tensors(path, Event())
    return caught.value


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_no_payload_runs(tmp_path: Path, wrapper: str) -> None:
    canary = tmp_path / "canary"
    for what, payload in payloads(canary).items():
        assert refused(WRAPPERS[wrapper](payload), tmp_path / "pytorch_model.bin").reason == "PICKLE_REFUSED"
        assert not canary.exists(), what


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".pt"])
def test_an_import_with_a_payload_is_refused(
    do: Convert, store: Store, llama: Path, tmp_path: Path, suffix: str
) -> None:
    source, canary = tmp_path / "m", tmp_path / "canary"
    shutil.copytree(llama, source, ignore=shutil.ignore_patterns("*.safetensors"))
    (source / f"pytorch_model{suffix}").write_bytes(saved({"x": payloads(canary)["os.system"]}))
    with pytest.raises(InvalidArgument) as caught:
        do(import_model=ImportTask(local_path=str(source)))
    assert caught.value.reason == "PICKLE_REFUSED" and "system" in caught.value.message and not canary.exists()
    assert not store.list("manifests/")


def test_every_payload_works_where_it_is_let(tmp_path: Path) -> None:
    for what, payload in payloads(tmp_path / "canary").items():
        pickle.loads(pickle.dumps(payload))
        assert (tmp_path / "canary").exists(), what
        shutil.rmtree(tmp_path / "canary")


def checkpoint(store: Store, folder: Path) -> ArtifactRef:
    return ArtifactRef(name="workspaces/w/datasets/d/revisions/r1", digest=publish_directory(store, "dataset", folder))


@pytest.mark.parametrize("where", ["message_hub", "meta", "state_dict"])
def test_a_payload_beside_the_tensors_stays_a_placeholder(
    do: Convert, store: Store, llama: Path, tmp_path: Path, where: str
) -> None:
    canary = tmp_path / "canary"
    base = ArtifactRef(name="b", digest=do(import_model=ImportTask(local_path=str(llama))))
    state: dict[str, Any] = {
        "state_dict": dict(load_file(GOLDEN / "iter_4.safetensors")),
        "meta": {},
        "message_hub": {},
    }
    state[where] = {**state[where], "x": payloads(canary)["os.system"]}
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "epoch_1.pth").write_bytes(saved(state))
    order = AdapterTask(source=checkpoint(store, tmp_path / "c"), base=base, lora_alpha=6)
    if where == "state_dict":
        with pytest.raises(InvalidArgument) as caught:
            do(adapter=order)
        assert caught.value.reason == "CHECKPOINT_UNSUPPORTED"
    else:
        assert load(store, do(adapter=order)).kind == "adapter"
    assert not canary.exists()


# ---------------------------------------------------------------------------------------------- pickles that lie

P = b"\x80\x02"


def tensor_pickle(storage: bytes, offset: int, shape: bytes, strides: bytes) -> bytes:
    """{"w": a tensor}, by hand, so that everything about it can be a lie."""
    place = (
        b"BINPERSID"
        and b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + storage + b"tQ"
    )
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + b"J" + struct.pack("<i", offset) + shape + strides
    return P + b"}X\x01\x00\x00\x00w" + call + b"\x89ccollections\nOrderedDict\n)R" + b"tRs."


def number(n: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", n)


GOOD = {"data/0": struct.pack("<4f", 1, 2, 3, 4)}
TWO = b"(" + number(2) + number(2) + b"t"
STRIDES = b"(" + number(2) + number(1) + b"t"


def laughs() -> bytes:
    """Thirty lists, each of ten times the one before: 10 ** 30 items."""
    value: list[Any] = ["ha"]
    for _ in range(30):
        value = [value] * 10
    return pickle.dumps({"x": value})


def endless() -> bytes:
    value: list[Any] = []
    value.append(value)
    return pickle.dumps({"x": value})


def nested() -> bytes:
    return P + b"]" * 100_000 + b"a" * 99_999 + b"."


def two_entries() -> bytes:
    buffer = io.BytesIO(saved({"w": torch.ones(2)}))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return buffer.getvalue()


def directory_lies() -> bytes:
    """A storage where the archive's directory says there is one, but nothing begins."""
    data = saved({"w": torch.ones(2)})
    at = data.index(b"archive/data/0") - 30
    return data[:at] + b"XX" + data[at + 2 :]


def lying_tensor(shape: bytes, strides: bytes = STRIDES, offset: int = 0, size: int = 4) -> bytes:
    return zip_with(tensor_pickle(number(size), offset, shape, strides), GOOD)


def pair(a: int, b: int) -> bytes:
    return b"(" + number(a) + number(b) + b"t"


LIES: dict[str, Callable[[], bytes]] = {
    "shape beyond the storage": lambda: lying_tensor(pair(4, 4)),
    "huge shape": lambda: lying_tensor(pair(1 << 46, 1 << 46)),
    "negative shape": lambda: lying_tensor(pair(-2, 2)),
    "negative stride": lambda: lying_tensor(TWO, pair(-2, 1)),
    "offset": lambda: lying_tensor(TWO, offset=3),
    "negative offset": lambda: lying_tensor(TWO, offset=-1),
    "shape is text": lambda: lying_tensor(b"(X\x01\x00\x00\x00at"),
    "huge storage": lambda: lying_tensor(TWO, size=1 << 60),
    "negative storage": lambda: lying_tensor(TWO, size=-4),
    "storage missing": lambda: zip_with(tensor_pickle(number(4), 0, TWO, STRIDES)),
    "compressed": lambda: zip_with(tensor_pickle(number(4), 0, TWO, STRIDES), GOOD, compress=True),
    "big endian": lambda: zip_with(tensor_pickle(number(4), 0, TWO, STRIDES), {**GOOD, "byteorder": b"big"}),
    "bomb": lambda: zip_with(b"\0" * (64 << 20), compress=True),
    "billion laughs": lambda: zip_with(laughs()),
    "endless": lambda: zip_with(endless()),
    "nested": lambda: zip_with(nested()),
    "huge text": lambda: zip_with(P + b"\x8d" + struct.pack("<Q", 1 << 62)),
    "huge memo": lambda: zip_with(P + b"}r" + struct.pack("<I", (1 << 32) - 1) + b"."),
    "extension": lambda: zip_with(P + b"\x82\x01."),
    "two tables": two_entries,
    "cut off": lambda: saved({"w": torch.ones(1000)})[:1500],
    "empty": lambda: b"",
    "noise": lambda: bytes(range(256)) * 8,
    "directory lies": directory_lies,
    "legacy with another list": lambda: legacy({"w": torch.ones(2)})[:-16] + struct.pack("<q", 1 << 50) + bytes(8),
}  # fmt: skip


def test_the_hand_made_tensor_is_read_when_it_tells_the_truth(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(zip_with(tensor_pickle(number(4), 0, TWO, STRIDES), GOOD))
    found = read_tensors(tmp_path / "x.bin", Event())
    assert torch.equal(as_torch(found["w"]), torch.tensor([[1.0, 2], [3, 4]]))


@pytest.mark.parametrize("what", LIES)
def test_a_pickle_that_lies_is_refused(tmp_path: Path, what: str) -> None:
    eats = what in ("huge text", "huge memo", "nested")
    reason = refused(LIES[what](), tmp_path / "pytorch_model.bin").reason
    assert reason == "PICKLE_REFUSED" or (eats and reason == "OUT_OF_MEMORY")


# ---------------------------------------------------------------------------------------------- safetensors that lie


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


HEADERS: dict[str, bytes] = {
    "header of 2^63 bytes": safetensors({}, length=1 << 63),
    "header longer than the file": safetensors({"w": entry(0, 16)}, length=1 << 20),
    "header above the limit": safetensors(b" " * 100_000_001),
    "no JSON": safetensors(b"{" * 8),
    "nested JSON": safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a list": safetensors([]),
    "overlapping": safetensors({"a": entry(0, 12), "b": entry(8, 16)}),
    "beyond the end": safetensors({"w": entry(0, 1 << 40)}),
    "a hole": safetensors({"a": entry(0, 4), "b": entry(8, 16)}),
    "backwards": safetensors({"w": entry(16, 0, [4])}),
    "negative": safetensors({"w": entry(-16, 0, [4])}),
    "duplicate": safetensors(b'{"w":%s,"w":%s}' % tuple(json.dumps(entry(n, n + 8)).encode() for n in (0, 8))),
    "huge shape": safetensors({"w": entry(0, 16, [1 << 62, 1 << 62])}),
    "shape of another size": safetensors({"w": entry(0, 16, [5])}),
    "negative shape": safetensors({"w": entry(0, 16, [-2, -2])}),
    "unknown dtype": safetensors({"w": entry(0, 16, dtype="F31")}),
    "more data than tensors": safetensors({"w": entry(0, 8)}),
    "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.parametrize("family", [False, True])
def test_a_safetensors_file_that_lies_is_refused(
    do: Convert, llama: Path, tmp_path: Path, what: str, family: bool
) -> None:
    source = tmp_path / "m"
    shutil.copytree(llama, source)
    if family:
        (source / "config.json").write_text(json.dumps(CONFIGS["internlm2"]))
    (source / "model.safetensors").write_bytes(HEADERS[what])
    with pytest.raises(InvalidArgument) as caught:
        do(import_model=ImportTask(local_path=str(source)))
    assert caught.value.reason == "WEIGHTS_MALFORMED", caught.value


# ---------------------------------------------------------------------------------------------- configs and templates


def test_code_beside_a_known_family_is_left_out(do: Convert, store: Store, tmp_path: Path) -> None:
    source = write_family("internlm2", tiny_tokenizer(tmp_path / "m"), random_weights("internlm2"))
    (source / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\n")
    given = json.loads((source / "tokenizer_config.json").read_text())
    given["auto_map"] = {"AutoTokenizer": ["modeling_evil.Evil", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(given))
    (source / "generation_config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "modeling_evil.Evil"}}))
    folder = materialise(store, load(store, do(import_model=ImportTask(local_path=str(source)))), tmp_path / "out")
    assert not (tmp_path / "canary").exists() and not list(folder.glob("*.py"))
    assert all("auto_map" not in f.read_text() for f in folder.glob("*.json"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [{"auto_map": {"AutoModel": "x.Y"}}, {"a": [{"b": [{"auto_map": {}}]}]}])
def test_code_of_any_other_model_is_refused(do: Convert, llama: Path, tmp_path: Path, name: str, value: Any) -> None:
    source = tmp_path / "m"
    shutil.copytree(llama, source)
    (source / name).write_text(json.dumps({**json.loads((source / name).read_text()), **value}))
    with pytest.raises(FailedPrecondition) as caught:
        do(import_model=ImportTask(local_path=str(source)))
    assert caught.value.reason == "REMOTE_CODE_REFUSED" and name in caught.value.message


@pytest.mark.parametrize(
    "text", ["{" * 100_000, "[" * 100_000, '{"a":' * 100_000, "null", "\0", '{"hidden_size": 1e999}'], ids=range(6)
)
def test_a_config_that_is_none_is_refused(do: Convert, llama: Path, tmp_path: Path, text: str) -> None:
    source = tmp_path / "m"
    shutil.copytree(llama, source)
    (source / "config.json").write_text(text)
    with pytest.raises(QuartetError) as caught:
        do(import_model=ImportTask(local_path=str(source)))
    assert not isinstance(caught.value, Internal)
    assert caught.value.reason in ("CONFIG_MALFORMED", "MODEL_UNSUPPORTED")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("key", ["layers", "hidden_size", "num_attention_heads"])
def test_a_config_of_impossible_size_is_refused(do: Convert, tmp_path: Path, name: str, key: str) -> None:
    source = write_family(name, tiny_tokenizer(tmp_path / "m"), random_weights(name))
    config = json.loads((source / "config.json").read_text())
    key = key if key != "layers" else "num_layers" if name == "chatglm" else "num_hidden_layers"
    (source / "config.json").write_text(json.dumps({**config, key: 10**12}))
    with pytest.raises(QuartetError) as caught:
        do(import_model=ImportTask(local_path=str(source)))
    assert caught.value.reason in ("MODEL_UNSUPPORTED", "WEIGHTS_INCOMPLETE")


TEMPLATES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "lipsum": "{{ lipsum.__globals__['os'].mkdir('CANARY') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "import": "{% import 'os' as os %}{{ os.mkdir('CANARY') }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_with_a_payload_does_nothing(
    do: Convert, store: Store, llama: Path, tmp_path: Path, name: str
) -> None:
    source, canary = tmp_path / "m", tmp_path / "canary"
    shutil.copytree(llama, source)
    (source / "chat_template.jinja").write_text(TEMPLATES[name].replace("CANARY", str(canary)))
    folder = materialise(store, load(store, do(import_model=ImportTask(local_path=str(source)))), tmp_path / "out")
    tokenizer = Tokenizer.from_files(folder)
    with pytest.raises(QuartetError) as caught:
        to_prompt_ids(load_template("tokenizer", tokenizer), tokenizer, [Message("user", "Hello")])
    assert not isinstance(caught.value, Internal) and not canary.exists()


@pytest.mark.parametrize("counts", [(1 << 60, 1), (1, 1 << 60), (1 << 60, 1 << 60)])
def test_a_gguf_file_that_lies_is_refused(do: Convert, tmp_path: Path, counts: tuple[int, int]) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(64))
    with pytest.raises(InvalidArgument) as caught:
        do(import_model=ImportTask(local_path=str(tmp_path / "m.gguf")))
    assert caught.value.reason == "GGUF_MALFORMED"


def test_a_weight_file_that_leads_out_is_not_followed(do: Convert, store: Store, llama: Path, tmp_path: Path) -> None:
    """An index that names a file elsewhere; links are refused by the service before a worker sees them."""
    source = tmp_path / "m"
    shutil.copytree(llama, source)
    save_file({"secret": torch.ones(2)}, tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"secret": name}}))
        with pytest.raises(InvalidArgument) as caught:
            do(import_model=ImportTask(local_path=str(source)))
        assert caught.value.reason == "WEIGHTS_INCOMPLETE"


# ---------------------------------------------------------------------------------------------- the second wall

PROBE = """
import encodings.idna, importlib.util, json, os, socket, sys
spec = importlib.util.spec_from_file_location("unpickle", sys.argv[1])
unpickle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(unpickle)
missing = unpickle.confine(4 << 30)
def tries(what):
    try:
        if what() == 0:
            os._exit(0)
        return "done"
    except (OSError, MemoryError) as error:
        return type(error).__name__
def write():
    with open(sys.argv[2], "wb") as file:
        file.write(b"x")
    return "written"
print(json.dumps({
    "missing": missing, "write": tries(write), "fork": tries(os.fork), "memory": tries(lambda: bytearray(5 << 30)),
    "connect": tries(lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), 2)),
    "mkdir": tries(lambda: os.mkdir(sys.argv[2] + "d")), "environment": dict(os.environ),
}))
"""


def test_the_process_that_reads_pickles_is_confined(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [
            sys.executable,
            "-I",
            "-c",
            PROBE,
            unpickle.__file__,
            str(tmp_path / "x"),
            str(server.getsockname()[1]),
        ]
        said = subprocess.run(command, env={}, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["write"] != "done" and found["memory"] == "MemoryError"
    assert not (tmp_path / "x").exists() or (tmp_path / "x").stat().st_size == 0
    assert set(found["environment"]) <= {"LC_CTYPE"}
    if "another user" not in found["missing"]:
        assert found["fork"] == "BlockingIOError"
    if "namespaces" not in found["missing"]:  # the kernel gives them to ordinary users
        assert found["connect"] == "OSError" and found["mkdir"] in ("OSError", "PermissionError")
