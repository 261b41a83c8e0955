"""Where the tensors lie in a pickled file. Run as a program of its own: argv is the file and the address space in bytes.

Nothing foreign runs: of all globals that a pickle may name only those that rebuild tensors and plain containers exist
here, and every other becomes an `Opaque` that does nothing. No weight is read either: the answer, as JSON on stdout,
says at which bytes of the file each tensor lies. That is the first wall; the second is `confine`.

This file imports nothing but the standard library, so that it starts at once and can be run with ``python -I``.
"""

from __future__ import annotations

import collections
import ctypes
import encodings.cp437  # noqa: F401  # zipfile asks for it late, when it may not be read any more
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
from typing import Any, BinaryIO

STORAGES: dict[str, tuple[str, int]] = {
    "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2), "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}  # fmt: skip
"""torch's storages: safetensors' word for the dtype, bytes of one number."""
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
PICKLE_LIMIT, NODE_LIMIT, DEPTH_LIMIT = 1 << 29, 1_000_000, 60


class Refused(Exception):
    """The file is not what it should be; the text says why."""


class Opaque:
    """Stands for whatever a pickle wants of another module: takes everything, does nothing."""

    name = ""

    def __new__(cls, *_: Any, **__: Any) -> Opaque:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Opaque:
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    append = extend = add = update = __setstate__


class Storage:
    """A run of numbers in the file; `start` is known when the file's table has been read."""

    def __init__(self, key: str, dtype: str, width: int, count: int) -> None:
        self.key, self.dtype, self.width, self.count, self.start = key, dtype, width, count, -1


class Tensor:
    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


class Rebuild:
    """torch._utils._rebuild_tensor_v2, of which only the place is kept."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise Refused("a tensor is not described as torch does")
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            raise Refused("a tensor has an impossible shape")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.count:
            raise Refused("a tensor is larger than its storage")
        return Tensor(storage, offset, shape, strides)


class Parameter:
    """torch._utils._rebuild_parameter: the tensor inside."""

    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


class FromType:
    """torch._tensor._rebuild_from_type_v2: what the first argument makes of the third."""

    __slots__ = ()

    def __call__(self, rebuild: Any, _: Any, arguments: Any, *__: Any) -> Any:
        if not isinstance(rebuild, Rebuild | Parameter) or type(arguments) is not tuple or not arguments:
            raise Refused("a tensor is not described as torch does")
        return rebuild(*arguments)


KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): Rebuild(),
    ("torch._utils", "_rebuild_parameter"): Parameter(),
    ("torch._tensor", "_rebuild_from_type_v2"): FromType(),
}


class Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        return type("Opaque", (Opaque,), {"name": f"{module}.{name}"[:200]})

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or pid[1] not in STORAGES.values():
            raise Refused(f"it has numbers of a kind that is not known: {_kind(pid)}")
        if type(pid[2]) is not str or type(pid[4]) is not int or pid[4] < 0 or (len(pid) > 5 and pid[5] is not None):
            raise Refused("a storage is not described as torch does")
        found = self.storages.setdefault(pid[2], Storage(pid[2], pid[1][0], pid[1][1], pid[4]))
        if (found.dtype, found.count) != (pid[1][0], pid[4]):
            raise Refused(f"storage {pid[2][:40]} is described twice and differently")
        return found


def _kind(pid: Any) -> str:
    kind = pid[1] if isinstance(pid, tuple) and len(pid) > 1 else pid
    opaque = isinstance(kind, type) and issubclass(kind, Opaque)
    return str(kind.name if opaque else type(kind).__name__)


def read_zip(file: BinaryIO) -> Any:
    """The object in a file of torch.save since 1.6: a zip of data.pkl and a file for each storage, none compressed."""
    with zipfile.ZipFile(file) as archive:
        entries = {e.filename: e for e in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise Refused("its archive names a file twice")
        found = [n for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(found) != 1:
            raise Refused("it is an archive, but none that torch.save makes")
        root = found[0].removesuffix("data.pkl")
        if any(e.compress_type or e.flag_bits & 1 for e in entries.values()):
            raise Refused("its archive is compressed or encrypted, which torch.save never does")
        if entries[found[0]].file_size > PICKLE_LIMIT:
            raise Refused("its table is too long")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise Refused("its numbers are big endian")
        with archive.open(found[0]) as content:
            unpickler = Unpickler(content)  # type: ignore[arg-type]
            data = unpickler.load()
    for storage in unpickler.storages.values():
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None or entry.file_size < storage.count * storage.width:
            raise Refused(f"storage {storage.key[:40]} is missing or cut off")
        # The local header's name and extra field may be longer than the directory's.
        file.seek(entry.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise Refused("its archive is damaged")
        storage.start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    return data


def read_legacy(file: BinaryIO) -> Any:
    """The object in a file of torch.save before 1.6: pickles one after the other, then the storages."""
    if Unpickler(file).load() != MAGIC or Unpickler(file).load() != PROTOCOL:
        raise Refused("it is no file that torch.save makes")
    Unpickler(file).load()  # sizes of numbers on the machine that wrote it
    unpickler = Unpickler(file)
    data = unpickler.load()
    keys = Unpickler(file).load()
    if type(keys) is not list or sorted(map(str, keys)) != sorted(unpickler.storages):
        raise Refused("its list of storages is not that of its tensors")
    for key in keys:
        storage = unpickler.storages[key]
        if file.read(8) != struct.pack("<q", storage.count):
            raise Refused(f"storage {key[:40]} has another size than its tensors say")
        storage.start = file.tell()
        file.seek(storage.count * storage.width, 1)
    return data


def to_plain(value: Any, budget: list[int], depth: int = 0) -> Any:
    """The object as JSON: {"d": pairs}, {"l": items}, {"t": tensor}, {"o": what it was}, or a scalar."""
    budget[0] -= 1
    if budget[0] < 0 or depth > DEPTH_LIMIT:
        raise Refused("it is nested too deeply or endlessly")
    kind = type(value)
    if kind in (dict, collections.OrderedDict):
        pairs = [(k, v) for k, v in value.items() if type(k) in (str, int)]
        if len(pairs) != len(value):
            return {"o": "a table by something else than names"}
        return {"d": [[k, to_plain(v, budget, depth + 1)] for k, v in pairs]}
    if kind in (list, tuple):
        return {"l": [to_plain(v, budget, depth + 1) for v in value]}
    if kind is Tensor:
        return {"t": _place(value)}
    if value is None or kind in (str, bool, int, float):
        return value
    opaque = kind if isinstance(value, Opaque) else value
    return {"o": opaque.name if isinstance(opaque, type) and issubclass(opaque, Opaque) else kind.__name__}


def _place(tensor: Tensor) -> list[Any]:
    storage, count = tensor.storage, 1
    dense: list[int] = []
    for side in reversed(tensor.shape):
        dense.insert(0, count)
        count *= side
    strides = [s for n, s in zip(tensor.shape, tensor.strides, strict=True) if n != 1]
    plain = count == 0 or strides == [s for n, s in zip(tensor.shape, dense, strict=True) if n != 1]
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)) + 1 if count else 0
    start = storage.start + tensor.offset * storage.width
    return [storage.dtype, tensor.shape, start, span * storage.width, [] if plain else tensor.strides]


def read(file: BinaryIO) -> Any:
    """The object in a pickled file, as to_plain gives it. Raises Refused."""
    head = file.read(4)
    file.seek(0)
    data = read_zip(file) if head == b"PK\x03\x04" else read_legacy(file)
    return to_plain(data, [NODE_LIMIT])


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("flow", ctypes.c_uint64),
        ("fd", ctypes.c_uint64),
    )


def confine(memory: int) -> list[str]:
    """No file can be written, no process started, no memory beyond `memory` bytes taken; and where the kernel lets an
    ordinary user have namespaces, there is no network and every disk is read-only. What could not be had."""
    limits = {"CORE": 0, "FSIZE": 0, "NPROC": 0, "AS": memory, "CPU": 900, "NOFILE": 16}
    libc = ctypes.CDLL(None, use_errno=True)
    missing = []
    if os.getuid() == 0:  # whom no limit of processes binds
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        except OSError:
            missing.append("another user")
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        missing.append("no_new_privs")
    if libc.unshare(0x10000000 | 0x40000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS
        missing.append("namespaces")
    else:
        read_only = _MountAttributes(1, 0, 0, 0)
        # mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, MOUNT_ATTR_RDONLY)
        if libc.syscall(442, -100, b"/", 0x8000, ctypes.byref(read_only), ctypes.sizeof(read_only)):
            missing.append("read-only disks")
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(number)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    return missing


def main() -> None:
    file = os.fdopen(os.open(sys.argv[1], os.O_RDONLY), "rb")
    confine(int(sys.argv[2]))
    try:
        answer = json.dumps(read(file))
    except MemoryError:
        sys.exit(3)
    except Refused as error:
        sys.exit(str(error))
    except Exception as error:  # a damaged pickle raises whatever its opcodes lead to
        sys.exit(f"it is no whole file of torch.save ({type(error).__name__})")
    sys.stdout.write(answer)


if __name__ == "__main__":
    main()
