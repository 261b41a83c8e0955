"""Real image files, whole and otherwise."""

from __future__ import annotations

import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from services.finetune.formats import Conversation, Message, Row
from services.finetune.prepare.images import Images, check_image


def picture(path: Path, kind: str, mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Path:
    Image.new(mode, size, 1).save(path, kind)
    return path


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes that declares any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )
    return path


def cut(path: Path) -> Path:
    data = picture(path, "JPEG", size=(640, 480)).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def written(data: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return write


def animated(path: Path) -> Path:
    frames = [Image.new("P", (32, 32), n) for n in range(3)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    return path


def chunked(kind: bytes, data: bytes) -> Callable[[Path], Path]:
    """A small good PNG with one more chunk behind its header."""

    def write(path: Path) -> Path:
        whole = picture(path, "PNG").read_bytes()
        chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        path.write_bytes(whole[:33] + chunk + whole[33:])
        return path

    return write


def turned(path: Path, exif: bytes = b"") -> Path:
    """A JPEG whose EXIF data, which may be damaged, say that it lies on its side."""
    data = Image.Exif()
    data[0x0112] = 6
    Image.new("RGB", (64, 48)).save(path, "JPEG", exif=exif or data)
    return path


GOOD: list[tuple[str, Callable[[Path], Path]]] = [
    ("jpeg", lambda p: picture(p, "JPEG")),
    ("cmyk", lambda p: picture(p, "JPEG", "CMYK")),
    ("palette", lambda p: picture(p, "PNG", "P")),
    ("16-bit", lambda p: picture(p, "PNG", "I;16")),
    ("webp", lambda p: picture(p, "WEBP")),
    ("animated", animated),
    ("transparent", lambda p: picture(p, "PNG", "RGBA")),
    ("turned", turned),
    ("damaged EXIF data", lambda p: turned(p, b"Exif\0\0MM\0*\xff\xff\xff\xff")),
    ("junk behind it", lambda p: written(picture(p, "PNG").read_bytes() + b"x" * 999)(p)),
    ("another ending", lambda p: picture(p, "PNG")),
    ("25 million pixels", lambda p: picture(p, "JPEG", "L", (5000, 5000))),
]
BAD: list[tuple[str, Callable[[Path], Path], str]] = [
    ("truncated", cut, "IMAGE_INVALID"),
    ("empty", written(b""), "IMAGE_INVALID"),
    ("svg", written(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "IMAGE_INVALID"),
    ("pdf", written(b"%PDF-1.7\n"), "IMAGE_INVALID"),
    ("text", written("不是图片".encode()), "IMAGE_INVALID"),
    ("PDF that calls itself JPEG", written(b"%PDF-1.7\n\xff\xd8\xff"), "IMAGE_INVALID"),
    ("81 million pixels", lambda p: bomb(p, 9000, 9000), "IMAGE_TOO_LARGE"),
    ("100 million pixels", lambda p: bomb(p, 10_000, 10_000), "IMAGE_TOO_LARGE"),
    ("400 million pixels", lambda p: bomb(p, 20_000, 20_000), "IMAGE_TOO_LARGE"),
    ("0 x 0", lambda p: bomb(p, 0, 0), "IMAGE_INVALID"),
    ("1 x 65535", lambda p: bomb(p, 1, 65_535), "IMAGE_TOO_THIN"),
    ("colour profile of 99 MB", chunked(b"iCCP", b"x\0\0" + zlib.compress(bytes(99_000_000))), "IMAGE_INVALID"),
    ("text of 99 MB", chunked(b"zTXt", b"x\0\0" + zlib.compress(bytes(99_000_000))), "IMAGE_INVALID"),
    (
        "BMP of 75 MB in 54 bytes",
        written(b"BM" + struct.pack("<3I3I2H6I", 54, 0, 54, 40, 5000, 5000, 1, 24, *[0] * 6)),
        "IMAGE_INVALID",
    ),
    ("21000 x 999", lambda p: bomb(p, 21_000, 999), "IMAGE_TOO_LARGE"),
    ("too little data", lambda p: bomb(p, 640, 480), "IMAGE_INVALID"),
]


@pytest.mark.parametrize(("case", "make"), GOOD, ids=[c for c, _ in GOOD])
def test_what_decodes_is_good(tmp_path: Path, case: str, make: Callable[[Path], Path]) -> None:
    assert check_image(make(tmp_path / "a.jpg")) is None


@pytest.mark.parametrize(("case", "make", "reason"), BAD, ids=[c for c, _, _ in BAD])
def test_what_does_not_is_told_and_costs_little(
    tmp_path: Path, case: str, make: Callable[[Path], Path], reason: str
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fault = check_image(make(tmp_path / "a.jpg"))
    assert fault is not None and fault[0] == reason and str(tmp_path) not in fault[1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB


def row(text: str, *images: str, file: str = "rows/a.jsonl") -> Row:
    return Row(file, 7, Conversation((Message("user", text), Message("assistant", "a")), images=images))


def test_images_are_counted_against_their_marks(tmp_path: Path) -> None:
    one, two = picture(tmp_path / "1.png", "PNG"), cut(tmp_path / "2.jpg")
    images = Images({"rows/1.png": one, "pictures/2.jpg": two})
    assert images.check(row("<image>\nwhat?", "1.png")) == []
    assert images.check(row("<image><image>", "rows/1.png", "1.png")) == []
    (marks,) = images.check(row("what?", "1.png"))
    assert (marks.file, marks.row, marks.field, marks.reason) == ("rows/a.jsonl", 7, "images", "IMAGE_MARKS")
    missing, invalid = images.check(row("<image><image>", "2.jpg", "pictures/2.jpg"))
    assert (missing.field, missing.reason) == ("images[0]", "IMAGE_MISSING")
    assert (invalid.field, invalid.reason) == ("images[1]", "IMAGE_INVALID")
    assert images.check(row("an <image> in a text-only row")) == []
    assert (images.rows, images.named, images.good) == (4, 6, 1)
