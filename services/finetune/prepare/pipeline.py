"""Rows of several datasets to memory-mapped blocks: read, tokenise, mask, weigh, pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.finetune.config import DataConfig
from services.finetune.errors import InvalidArgument, QuartetError
from services.finetune.formats import Row, read_rows
from services.finetune.packing import Blocks, pack
from services.finetune.templates import Encoded, Template, encode, load_template
from services.finetune.tokenizer import Tokenizer

EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Where the bars of a histogram of lengths begin, in tokens; the last has no end."""
TOLD_ROWS = 500
"""Rows between two calls of `on_rows`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One dataset revision on disk. `files` are (path in the artifact, path on disk); `weight` as DataConfig.weights."""

    name: str
    files: tuple[tuple[str, Path], ...]
    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What `build` made."""

    blocks: Blocks
    index: Mapping[str, Any]
    """rows (good ones, before weights), tokens, learned, blocks, fill, truncated, dropped, and lengths: how many rows
    begin at each of EDGES."""


def build(
    sources: Sequence[Source],
    template: str,
    model_dir: Path,
    data: DataConfig,
    seed: int,
    out: Path,
    *,
    processes: int = 0,
    on_rows: Callable[[int], None] | None = None,
) -> Built:
    """Write the blocks of all good rows below `out`; bad rows were settled when their revision was committed.

    The same arguments give the same bytes. `on_rows` hears how many rows are done, and may raise to stop.
    Raises InvalidArgument (DATASET_EMPTY, TEMPLATE_UNKNOWN), FailedPrecondition (TEMPLATE_MISSING, TOKENIZER_MISSING).
    """
    tokenizer = Tokenizer.from_files(model_dir)
    chosen = load_template(template, tokenizer)
    samples: list[Encoded] = []
    every: list[Encoded] = []
    for n, source in enumerate(sources):
        encoded = list(_encoded(source, chosen, tokenizer, data.system, len(every), on_rows))
        every += encoded
        samples += _weighed(encoded, source.weight, seed, n)
    blocks = pack(samples, data.max_length, data.pack)
    if not len(blocks):
        raise InvalidArgument(
            f"none of the {len(every)} rows has an answer within data.max_length = {data.max_length} tokens",
            reason="DATASET_EMPTY",
        )
    blocks.save(out)
    tokens = int((blocks.segments > 0).sum())
    index = {
        "rows": len(every),
        "tokens": tokens,
        "learned": int((blocks.labels >= 0).sum()),
        "blocks": len(blocks),
        "fill": tokens / blocks.ids.size,
        "truncated": sum(len(s.ids) > data.max_length for s in every),
        "dropped": sum(not any(s.mask[1 : data.max_length]) for s in every),
        "lengths": {"edges": list(EDGES), "counts": bars([len(s.ids) for s in every])},
    }
    return Built(blocks=Blocks.open(out), index=index)


def _encoded(
    source: Source,
    template: Template,
    tokenizer: Tokenizer,
    system: str,
    before: int,
    on_rows: Callable[[int], None] | None,
) -> Iterator[Encoded]:
    good = (r for r in read_rows(source.files, source.format) if isinstance(r, Row))
    for n, row in enumerate(good, 1):
        try:
            yield encode(template.pieces(row.conversation, system), tokenizer)
        except QuartetError as error:
            blamed = f"{source.name} files[{row.file}].rows[{row.row}]: {error.message}"
            raise type(error)(blamed, reason=error.reason, metadata=error.metadata) from error
        if on_rows is not None and n % TOLD_ROWS == 0:
            on_rows(before + n)


def _weighed(samples: list[Encoded], weight: float, seed: int, source: int) -> list[Encoded]:
    """All samples as often as the whole part of `weight` says, and a seeded choice for the rest, in their order."""
    import numpy as np

    times, part = divmod(weight, 1)
    draw = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, source], np.uint64)))
    extra = np.sort(draw.permutation(len(samples))[: round(part * len(samples))])
    return samples * int(times) + [samples[n] for n in extra]


def bars(lengths: Sequence[int]) -> list[int]:
    """How many lengths lie between each of EDGES and the next."""
    import numpy as np

    places = np.searchsorted(EDGES, np.asarray(lengths, np.int64), "right") - 1
    return [int(count) for count in np.bincount(places, minlength=len(EDGES))]
