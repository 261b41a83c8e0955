"""Samples to blocks of equal length, memory-mapped. No sample is cut unless it is longer than a block.

On disk each sample stands once, as it was read, and a block is a list of samples; what a block looks like is worked out
when it is asked for. So a sample may be in several blocks, and nothing is copied to lay it out. All numbers are
little-endian, equal samples make equal bytes:

    tokens.bin   ids of all samples, one after another: uint16, or int32 for a vocabulary that needs it
    mask.bin     for each token a bit, lowest first: whether it is learned
    offsets.bin  int64: where each sample begins in the two above, and the end of the last
    members.bin  int64: sample numbers, block by block
    starts.bin   int64: where each block begins in members.bin, and the end of the last
    index.json   length of a block, dtype of the ids, counts, and what its writer knows
    held_out/    offsets, members, starts and index.json of the samples that are kept for validation, if there are any

Of samples with images, whose tokens are ids as all others, also:

    images.bin         int32: the images of all samples by number, one after another
    image_offsets.bin  int64: where each sample's images begin in it, and the end of the last
    images.json        the images' files by number, as digests of blobs

Letters in shapes: S samples, N blocks, L tokens a block, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from services.finetune.errors import InvalidArgument
from services.finetune.templates import Encoded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int32]
    Longs = NDArray[np.int64]
    Bools = NDArray[np.bool_]
else:
    Ints = Longs = Bools = Any

IGNORED = -100
"""The label of a token that is not learned."""
HELD_OUT = "held_out"
"""The folder of the validation samples' layout."""

_COLUMNS = ("ids", "labels", "positions", "segments")


@dataclass(frozen=True, slots=True)
class Pictures:
    """The images of samples: `numbers` of `files`, sample by sample as `offsets` say."""

    files: tuple[str, ...]
    numbers: Ints
    offsets: Longs

    def save(self, directory: Path) -> None:
        self.numbers.astype("<i4").tofile(directory / "images.bin")
        self.offsets.astype("<i8").tofile(directory / "image_offsets.bin")
        (directory / "images.json").write_text(json.dumps(self.files, indent=0) + "\n", "utf-8")

    def of_samples(self) -> Iterator[bytes]:
        """What tells the images of each sample from other images."""
        for a, b in pairwise(self.offsets.tolist()):
            yield "".join(self.files[n] for n in self.numbers[a:b].tolist()).encode()

    @classmethod
    def open(cls, directory: Path) -> Self | None:
        """None of samples without images."""
        if not (directory / "images.json").exists():
            return None
        files = tuple(json.loads((directory / "images.json").read_text("utf-8")))
        return cls(files, _mapped(directory / "images.bin", "<i4"), _mapped(directory / "image_offsets.bin", "<i8"))


@dataclass(frozen=True, slots=True)
class Flat:
    """What lies on disk; see above."""

    length: int
    tokens: NDArray[Any]
    mask: NDArray[np.uint8]
    offsets: Longs
    members: Longs
    starts: Longs
    pictures: Pictures | None = None

    def sample(self, number: int) -> tuple[NDArray[Any], Bools]:
        """Ids and mask of one sample; its first token, which nothing predicts, is never learned."""
        import numpy as np

        places = np.arange(self.offsets[number], self.offsets[number + 1])
        return self.tokens[places], self.learned(places)

    def learned(self, places: Longs) -> Bools:
        """Whether the tokens at `places` are learned."""
        bits: Bools = (self.mask[places >> 3] >> (places & 7).astype("u1") & 1).astype(bool)
        return bits

    def take(self, column: str, blocks: Longs) -> Ints:
        """A column of some blocks, int32 [len(blocks), L]."""
        import numpy as np

        firsts, counts = self.starts[blocks], self.starts[blocks + 1] - self.starts[blocks]
        within = ranges(np.zeros_like(counts), counts)
        members = self.members[np.repeat(firsts, counts) + within]
        begins = self.offsets[members]
        sizes = self.offsets[members + 1] - begins
        # How far a sample begins from the start of the first of these blocks, were there no padding between blocks.
        joined = np.cumsum(sizes) - sizes
        block = np.repeat(np.arange(len(blocks)), counts)
        at = joined - joined[np.arange(len(members)) - within] + block * self.length
        found = np.full(len(blocks) * self.length, IGNORED if column == "labels" else 0, np.int32)
        to = ranges(at, sizes)
        if column == "positions":
            found[to] = ranges(np.zeros_like(sizes), sizes)
        elif column == "segments":
            found[to] = np.repeat(within + 1, sizes)
        else:
            places = ranges(begins, sizes)
            if column == "labels":
                learned = self.learned(places)
                places, to = places[learned], to[learned]
            found[to] = self.tokens[places]
        return found.reshape(len(blocks), self.length)


@dataclass(frozen=True, slots=True)
class _Column:
    """Looks like an int32 [N, L] array to who indexes it by block number, as blocks of a mapped file do."""

    flat: Flat
    name: str

    def __len__(self) -> int:
        return len(self.flat.starts) - 1

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.flat.length

    def __getitem__(self, index: Any) -> Ints:
        import numpy as np

        blocks = np.asarray(np.arange(len(self))[index])
        return self.flat.take(self.name, blocks.reshape(-1)).reshape(*blocks.shape, self.flat.length)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Ints:
        found = self[:]
        return found if dtype is None else found.astype(dtype)


@dataclass(frozen=True, slots=True)
class Blocks:
    """`labels` are ids, or IGNORED; `positions` restart at 0 for each sample; `segments` number the samples of a block
    from 1, 0 is padding. All are int32 [N, L]; of opened blocks index them, only what is asked for is read."""

    ids: Ints
    labels: Ints
    positions: Ints
    segments: Ints
    flat: Flat
    learned: int
    """Learned tokens in all blocks."""
    truncated: int
    """Samples that were cut at L tokens."""
    dropped: int
    """Samples with nothing to learn in their first L tokens."""

    def __len__(self) -> int:
        return len(self.flat.starts) - 1

    @property
    def tokens(self) -> int:
        """Tokens of samples in all blocks, padding not counted."""
        return int((self.flat.offsets[self.flat.members + 1] - self.flat.offsets[self.flat.members]).sum())

    @property
    def image_files(self) -> tuple[str, ...]:
        """Digests of the blobs that hold the images, by their numbers; empty where no sample has one."""
        return self.flat.pictures.files if self.flat.pictures else ()

    def images_of(self, block: int) -> Ints:
        """The numbers of a block's images, int32, in the order in which their tokens stand."""
        import numpy as np

        pictures, flat = self.flat.pictures, self.flat
        if pictures is None:
            return np.zeros(0, np.int32)
        members = flat.members[flat.starts[block] : flat.starts[block + 1]]
        begins = pictures.offsets[members]
        return pictures.numbers[ranges(begins, pictures.offsets[members + 1] - begins)]

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.flat.tokens.tofile(directory / "tokens.bin")
        self.flat.mask.tofile(directory / "mask.bin")
        if self.flat.pictures is not None:
            self.flat.pictures.save(directory)
        self.save_layout(directory, {})

    def save_layout(self, directory: Path, about: Mapping[str, Any]) -> None:
        """Write all but tokens and mask, which are there; `about` goes into index.json beside the counts."""
        directory.mkdir(parents=True, exist_ok=True)
        flat, places = self.flat, len(self) * self.flat.length
        for name in ("offsets", "members", "starts"):
            getattr(flat, name).astype("<i8").tofile(directory / f"{name}.bin")
        index = {
            "version": 1,
            "length": flat.length,
            "ids": str(flat.tokens.dtype),
            "samples": len(flat.offsets) - 1,
            "laid_out": len(flat.members),
            "blocks": len(self),
            "tokens": self.tokens,
            "learned": self.learned,
            "fill": round(self.tokens / places, 6) if places else 1.0,
            "truncated": self.truncated,
            "dropped": self.dropped,
        }
        text = json.dumps({**index, **about}, indent=1, sort_keys=True, ensure_ascii=False)
        (directory / "index.json").write_text(text + "\n", "utf-8")

    @classmethod
    def open(cls, directory: Path, part: str = "") -> Self:
        """Map saved blocks into memory, read-only. `part` is HELD_OUT for those kept for validation."""
        index = json.loads((directory / part / "index.json").read_text("utf-8"))
        tokens, mask = _mapped(directory / "tokens.bin", index["ids"]), _mapped(directory / "mask.bin", "u1")
        offsets, members, starts = (
            _mapped(directory / part / f"{n}.bin", "<i8") for n in ("offsets", "members", "starts")
        )
        flat = Flat(index["length"], tokens, mask, offsets, members, starts, Pictures.open(directory))
        return cls.of(flat, index["learned"], index["truncated"], index["dropped"])

    @classmethod
    def of(cls, flat: Flat, learned: int, truncated: int, dropped: int) -> Self:
        """Blocks that are put together as they are asked for."""
        columns = {name: cast("Ints", _Column(flat, name)) for name in _COLUMNS}
        return cls(**columns, flat=flat, learned=learned, truncated=truncated, dropped=dropped)


def pack(samples: Sequence[Encoded], max_length: int, packed: bool) -> Blocks:
    """Lay samples into blocks of `max_length` tokens, best fit if `packed`, else one a block; all in memory.

    Without packing, blocks are only as long as the longest sample. The layout depends on nothing but the samples.
    """
    import numpy as np

    cut = [(s.ids[:max_length], s.mask[:max_length]) for s in samples]
    # The first token of a sample is predicted by nothing of its own, so it is never learned.
    kept = [(ids, [False, *mask[1:]]) for ids, mask in cut if any(mask[1:])]
    lengths = np.array([len(ids) for ids, _ in kept], np.int64)
    tokens = np.array([i for ids, _ in kept for i in ids], np.int32)
    mask = np.array([m for _, mask in kept for m in mask], bool)
    members, starts = lay_out(lengths, max_length, packed)
    length = block_length(lengths, max_length, packed)
    flat = Flat(length, tokens, np.packbits(mask, bitorder="little"), offsets_of(lengths), members, starts)
    whole = {name: flat.take(name, np.arange(len(starts) - 1)) for name in _COLUMNS}
    truncated, dropped = sum(len(s.ids) > max_length for s in samples), len(samples) - len(kept)
    return Blocks(**whole, flat=flat, learned=int(mask.sum()), truncated=truncated, dropped=dropped)


def order(n: int, epoch: int, seed: int) -> Longs:
    """The order of `n` blocks in an epoch: a permutation that depends on these three numbers only."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64))).permutation(n)


def held(tokens: NDArray[Any], offsets: Longs, ratio: float, seed: int, pictures: Pictures | None = None) -> Bools:
    """Which samples are kept for validation: `ratio` of the distinct ones, at least one, by a hash of tokens and images.

    So equal samples never stand on both sides, and a sample stays on its side while others come and go, but for a few at
    the border. InvalidArgument (VALIDATION_EMPTY) if there are no two distinct samples.
    """
    import numpy as np

    key, bounds = (seed % 2**64).to_bytes(8, "little"), offsets.tolist()
    shown = pictures.of_samples() if pictures else repeat(b"")
    hashes = np.array(
        [
            int.from_bytes(hashlib.blake2b(tokens[a:b].tobytes() + seen, digest_size=8, key=key).digest(), "little")
            for (a, b), seen in zip(pairwise(bounds), shown, strict=False)
        ],
        np.uint64,
    )
    distinct = np.unique(hashes)
    count = min(max(1, round(ratio * len(distinct))), len(distinct) - 1)
    if count < 1:
        raise InvalidArgument(
            "all rows are the same, so none can be held out; set validation.ratio to 0 or name datasets for validation",
            reason="VALIDATION_EMPTY",
            metadata={"key": "validation.ratio"},
        )
    kept: Bools = hashes < distinct[count]
    return kept


def offsets_of(lengths: Longs) -> Longs:
    """Where each of the runs of these lengths begins, and the end of the last."""
    import numpy as np

    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))


def ranges(starts: Longs, sizes: Longs) -> Longs:
    """start, start + 1, … of each run, one run after another."""
    import numpy as np

    ends = np.cumsum(sizes)
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(ends[-1] if len(ends) else 0)


def block_length(lengths: Longs, max_length: int, packed: bool) -> int:
    """Tokens in a block for samples of these lengths."""
    return max_length if packed else int(lengths.max(initial=1))


def lay_out(lengths: Longs, max_length: int, packed: bool, seed: int = 0) -> tuple[Longs, Longs]:
    """(members, starts) of the blocks for samples of these lengths, each from 1 to max_length.

    Packed by best-fit decreasing; `seed` decides which of several samples of one length goes where, so that blocks mix
    what lies apart in the data.
    """
    import numpy as np

    if not packed:
        return np.arange(len(lengths)), np.arange(len(lengths) + 1)
    shuffled = order(len(lengths), 0, seed)
    longest_first = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    block = _best_fit(lengths[longest_first], max_length)
    return longest_first[np.argsort(block, kind="stable")], offsets_of(np.bincount(block))


def _best_fit(lengths: Longs, room: int) -> Longs:
    """The block of each sample, longest first: that in which it leaves the least room.

    Samples of one length and blocks with one room left are alike, so they are placed many at once: a block with room r
    takes r // length such samples before another fits better.
    """
    import numpy as np

    found = np.empty(len(lengths), np.int64)
    with_room: dict[int, list[Longs]] = {}
    rooms = 0  # bit r: there are blocks with room r
    at = blocks = 0
    sizes, counts = np.unique(lengths, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            if fitting := rooms >> size:
                left = size + (fitting & -fitting).bit_length() - 1
                rooms &= ~(1 << left)
                candidates = np.concatenate(with_room.pop(left))
            else:
                left = room
                candidates = np.arange(blocks, blocks - (-count // (room // size)))
                blocks += len(candidates)
            each = left // size
            placed = min(count, each * len(candidates))
            found[at : at + placed] = np.repeat(candidates[: -(-placed // each)], each)[:placed]
            full, rest = divmod(placed, each)
            for some, now in (
                (candidates[:full], left - each * size),
                (candidates[full : full + 1] if rest else candidates[:0], left - rest * size),
                (candidates[full + bool(rest) :], left),
            ):
                if len(some) and now:
                    with_room.setdefault(now, []).append(some)
                    rooms |= 1 << now
            at, count = at + placed, count - placed
    return found


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    import numpy as np

    # An empty file cannot be mapped. The view is a plain array, which is faster to index.
    return np.memmap(path, dtype, "r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)
