"""Packing: what goes in comes out, best fit, files that repeat, an order that can be entered anywhere."""

from __future__ import annotations

import bisect
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.finetune.packing import IGNORED, Blocks, Flat, Pictures, lay_out, offsets_of, order, pack
from services.finetune.templates import Encoded

masks = st.lists(st.lists(st.booleans(), min_size=1, max_size=40), max_size=60)


def encoded(masks: list[list[bool]]) -> list[Encoded]:
    return [Encoded([1000 * n + k for k in range(len(mask))], mask) for n, mask in enumerate(masks)]


@given(masks=masks, room=st.integers(2, 32), packed=st.booleans())
def test_every_sample_comes_back_from_the_blocks_in_order(masks: list[list[bool]], room: int, packed: bool) -> None:
    samples = encoded(masks)
    with tempfile.TemporaryDirectory() as folder:
        pack(samples, room, packed).save(Path(folder))
        blocks = Blocks.open(Path(folder))
        found: dict[int, tuple[list[int], list[bool]]] = {}
        for block in range(len(blocks)):
            first = blocks.flat.starts[block]
            for segment in range(1, blocks.segments[block].max() + 1):
                here = blocks.segments[block] == segment
                ids, labels = blocks.ids[block][here], blocks.labels[block][here]
                assert blocks.positions[block][here].tolist() == list(range(len(ids)))
                learned = labels != IGNORED
                assert (labels[learned] == ids[learned]).all()
                found[int(blocks.flat.members[first + segment - 1])] = (ids.tolist(), learned.tolist())
        padding = np.asarray(blocks.segments) == 0
        assert (np.asarray(blocks.labels)[padding] == IGNORED).all() and not np.asarray(blocks.ids)[padding].any()
    cut = [(s.ids[:room], [False, *s.mask[1:room]]) for s in samples]
    assert [found[n] for n in range(len(found))] == [(ids, mask) for ids, mask in cut if any(mask)]
    assert blocks.tokens == sum(len(ids) for ids, _ in found.values())
    assert blocks.learned == sum(sum(mask) for _, mask in found.values())
    assert (blocks.truncated, blocks.dropped) == (sum(len(s.ids) > room for s in samples), len(masks) - len(found))


@given(masks=masks, room=st.integers(2, 32), index=st.lists(st.integers(0, 10), max_size=6))
def test_opened_blocks_are_those_in_memory(masks: list[list[bool]], room: int, index: list[int]) -> None:
    made = pack(encoded(masks), room, True)
    numbers = np.array([i % len(made) for i in index] if len(made) else [], np.int64)
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder))
        blocks = Blocks.open(Path(folder))
        for name in ("ids", "labels", "positions", "segments"):
            column, whole = getattr(blocks, name), getattr(made, name)
            assert column.shape == whole.shape and len(column) == len(made)
            assert column[numbers].dtype == np.int32 and (column[numbers] == whole[numbers]).all()
            assert (np.asarray(column) == whole).all()


@given(lengths=st.lists(st.integers(1, 32), max_size=200), seed=st.integers(0, 2**64 - 1))
def test_the_layout_is_best_fit_decreasing(lengths: list[int], seed: int) -> None:
    members, starts = lay_out(np.array(lengths, np.int64), 32, True, seed)
    assert sorted(members.tolist()) == list(range(len(lengths)))
    left = [32 - sum(lengths[n] for n in members[a:b]) for a, b in pairwise(starts)]
    assert sorted(left) == sorted(best_fit_one_by_one(lengths, 32))


def best_fit_one_by_one(lengths: list[int], room: int) -> list[int]:
    """What is left in each block when each sample, longest first, goes where it leaves the least room."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(free, length)
        bisect.insort(free, (free.pop(at) if at < len(free) else room) - length)
    return free


@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=50), seed=st.integers(0, 9))
def test_a_seed_repeats_its_layout(lengths: list[int], seed: int) -> None:
    first, second = (lay_out(np.array(lengths), 32, True, seed) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_a_sample_may_stand_in_several_blocks() -> None:
    made = pack(encoded([[True] * 5, [True] * 3]), 8, False).flat
    twice = Flat(5, made.tokens, made.mask, made.offsets, np.array([0, 1, 0]), np.array([0, 1, 3]))
    blocks = Blocks.of(
        Flat(8, *(getattr(twice, f) for f in ("tokens", "mask", "offsets", "members", "starts"))), 10, 0, 0
    )
    assert blocks.ids[np.array([0, 1])].tolist() == [[0, 1, 2, 3, 4, 0, 0, 0], [1000, 1001, 1002, 0, 1, 2, 3, 4]]
    assert blocks.segments[1].tolist() == [1, 1, 1, 2, 2, 2, 2, 2]


@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=20), files=st.integers(1, 5), room=st.integers(4, 40))
def test_a_blocks_images_are_those_of_its_samples(counts: list[int], files: int, room: int) -> None:
    digests = tuple(f"sha256:{n}" for n in range(files))
    numbers = np.array([n % files for n in range(sum(counts))], np.int32)
    pictures = Pictures(digests, numbers, offsets_of(np.array(counts, np.int64)))
    made = pack(encoded([[True] * (n % 4 + 2) for n in range(len(counts))]), room, True).flat
    with tempfile.TemporaryDirectory() as folder:
        Blocks.of(replace(made, pictures=pictures), 0, 0, 0).save(Path(folder))
        blocks = Blocks.open(Path(folder))
    own = np.split(numbers, np.cumsum(counts)[:-1])
    assert blocks.image_files == digests
    for block in range(len(blocks)):
        members = made.members[made.starts[block] : made.starts[block + 1]]
        assert blocks.images_of(block).tolist() == [int(n) for m in members for n in own[m]]


def test_one_row_is_one_block_and_none_is_none(tmp_path: Path) -> None:
    for masks, expected in (([[True, True]], 1), ([], 0)):
        pack(encoded(masks), 2048, True).save(tmp_path / str(expected))
        blocks = Blocks.open(tmp_path / str(expected))
        assert len(blocks) == expected and blocks.ids.shape == (expected, 2048)


def test_equal_samples_make_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pack(encoded([[True] * n for n in range(1, 30)]), 32, True).save(tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["index.json", "mask.bin", "members.bin", "offsets.bin", "starts.bin", "tokens.bin"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@given(
    n=st.integers(1, 50), epochs=st.integers(1, 3), per_step=st.integers(1, 8), seed=st.integers(0, 2**32), at=st.data()
)
def test_a_resume_at_any_step_goes_on_as_if_never_stopped(
    n: int, epochs: int, per_step: int, seed: int, at: st.DataObject
) -> None:
    per_epoch = -(-n // per_step)
    steps = epochs * per_epoch

    def blocks_from(step: int) -> list[list[int]]:
        """What a run that starts at `step`, knowing nothing of those before, reads; as the training loop does."""
        places = (divmod(s, per_epoch) for s in range(step, steps))
        return [order(n, epoch, seed)[place * per_step : (place + 1) * per_step].tolist() for epoch, place in places]

    whole = blocks_from(0)
    for epoch in range(epochs):
        assert sorted(b for step in whole[epoch * per_epoch : (epoch + 1) * per_epoch] for b in step) == list(range(n))
    cut = at.draw(st.integers(0, steps))
    assert whole[:cut] + blocks_from(cut) == whole


@pytest.mark.parametrize("lengths", [[], [3], [2, 0, 5]])
def test_offsets_are_where_runs_begin(lengths: list[int]) -> None:
    assert offsets_of(np.array(lengths, np.int64)).tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
