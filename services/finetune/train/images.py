"""The images of a run's blocks: fetched from the store, decoded ahead of the step, given to the model.

A tower that is frozen makes the same of an image every time, so its features are kept on the local disk, and the image is
neither decoded nor looked at again. Letters in shapes as in seeing.py.
"""

from __future__ import annotations

import io
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.finetune.config import RunConfig
from services.finetune.errors import NotFound
from services.finetune.modules import TOWER, is_seeing
from services.finetune.packing import Blocks
from services.finetune.store import Store
from services.finetune.store.artifacts import File, free_bytes, stream_file
from services.finetune.train.model import computing
from services.finetune.train.parallel import Batch
from services.finetune.train.seeing import Seen, look_at
from services.finetune.vision import ImageForm, pixels

AHEAD = 64
"""Images that are decoded before they are asked for: of 336 pixels a side they take 87 MB."""
KEPT_BYTES = 16 << 30
"""The most that image files, and features once more, take of a machine's disk; a third of what is free, if that is less."""
AT_ONCE = 32
"""Images that a frozen tower looks at together."""


class Reader:
    """Pixels of images by digest, made by threads. Files stay in `folder` for a later epoch as long as there is room."""

    def __init__(self, store: Store, form: ImageForm, folder: Path, threads: int, room: int) -> None:
        self._store, self._form, self._folder = store, form, folder
        self._room = room
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(threads, "images")
        self._coming: Iterator[str] = iter(())
        self._due: deque[str] = deque()
        """What is begun, in the order in which it will be asked for."""
        self._begun: dict[str, Future[Any]] = {}

    def expect(self, digests: Iterable[str]) -> None:
        """From now on these will be asked for in this order, perhaps with gaps, and others in between."""
        self._coming, self._due, self._begun = iter(digests), deque(), {}
        self._fill()

    def read(self, digests: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """Pixels [3, S, S] of each, float32. Whatever the store raises."""
        futures = [self._begun.get(d) or self._begin(d) for d in digests]
        for digest in digests:
            # What was due before it was left out, and will not come again.
            while digest in self._due and self._due.popleft() != digest:
                pass
        due = set(self._due)
        self._begun = {d: f for d, f in self._begun.items() if d in due}
        self._fill()
        return [f.result() for f in futures]

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _fill(self) -> None:
        while len(self._due) < AHEAD and (digest := next(self._coming, "")):
            self._due.append(digest)
            if digest not in self._begun:
                self._begin(digest)

    def _begin(self, digest: str) -> Future[Any]:
        self._begun[digest] = begun = self._threads.submit(self._decode, digest)
        return begun

    def _decode(self, digest: str) -> np.ndarray[Any, Any]:
        path = self._folder / digest.rpartition(":")[2]
        if path.exists():
            return pixels(path, self._form)
        blob = self._store.stat_blob(digest)
        if blob is None:
            raise NotFound(f"the image {digest} is not in the store", reason="BLOB_NOT_FOUND")
        with self._lock:
            self._room -= blob.size
            fits = self._room >= 0
        if not fits:
            return pixels(io.BytesIO(b"".join(stream_file(self._store, File(digest, digest, blob.size)))), self._form)
        self._store.fetch_blob(digest, path)
        return pixels(path, self._form)


class Kept:
    """Tensors of one shape by digest, in a file. When it is full it takes no more in: with a shuffled order, whatever were
    thrown out would be as likely to come next as what replaced it."""

    def __init__(self, path: Path, room: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._room = room
        self._places: dict[str, int] = {}
        self._whole: set[str] = set()
        self._like = torch.empty(0)
        self._writer = ThreadPoolExecutor(1, "features")

    def __contains__(self, digest: str) -> bool:
        return digest in self._whole

    def get(self, digests: Sequence[str]) -> Tensor:
        """What is kept of these, stacked, in host memory."""
        found = self._like.new_empty((len(digests), *self._like.shape))
        for digest, out in zip(digests, found, strict=True):
            os.preadv(self._file, [memoryview(out.view(torch.uint8).numpy())], self._places[digest] * out.nbytes)
        return found

    def put(self, digests: Sequence[str], values: Tensor) -> None:
        """Keep what there is room for; it is written while the step goes on."""
        self._like = torch.empty(values.shape[1:], dtype=values.dtype)
        slots = max(0, self._room // self._like.nbytes - len(self._places))
        fresh = [n for n, digest in enumerate(digests) if digest not in self._places][:slots]
        if not fresh:
            return
        chosen, ready = values[fresh[0] : fresh[-1] + 1], None
        if chosen.is_cuda:
            host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            chosen, ready = host.copy_(chosen, non_blocking=True), torch.cuda.Event()
            ready.record()
        for n in fresh:
            self._places[digests[n]] = len(self._places)
        self._writer.submit(self._write, [(digests[n], chosen[n - fresh[0]]) for n in fresh], ready)

    def close(self) -> None:
        self._writer.shutdown()
        os.close(self._file)

    def _write(self, pairs: Sequence[tuple[str, Tensor]], ready: Any) -> None:
        if ready is not None:
            ready.synchronize()
        for digest, value in pairs:
            data = value.contiguous().view(torch.uint8).numpy().tobytes()
            # Of a disk that is full meanwhile nothing is whole, and so nothing is read back.
            os.pwrite(self._file, data, self._places[digest] * len(data))
            self._whole.add(digest)


@dataclass(frozen=True, slots=True)
class Look:
    """How a run looks at its images."""

    device: torch.device
    dtype: torch.dtype
    fixed: bool = True
    """A frozen tower looks at one at a time, so that its features do not hang on what else is in a batch."""
    inside: bool = False
    """A frozen tower runs with every step all the same, as where ZeRO deals its weights out."""
    again: bool = True
    """Images come more than once."""


class Images:
    """The images of a run, for its engine; `ranks` share the machine."""

    def __init__(self, causal: Any, form: ImageForm, store: Store, folder: Path, look: Look, ranks: int = 1) -> None:
        self.causal, self.form, self.device, self.dtype = causal, form, look.device, look.dtype
        trained = [n for n, p in causal.named_parameters() if p.requires_grad]
        self.trained = any(is_seeing(n) for n in trained)
        """Whether there is a gradient to be had from images."""
        self.tower_trained = any(n.startswith(TOWER) for n in trained)
        self._inside = look.inside or self.tower_trained
        folder.mkdir(parents=True, exist_ok=True)
        room = min(KEPT_BYTES, free_bytes(folder) // 3) // ranks
        processors = len(os.sched_getaffinity(0)) // ranks
        self._reader = Reader(store, form, folder / "files", max(1, min(16, processors)), room)
        self.kept = Kept(folder / "features.bin", room) if look.again and not self._inside else None
        self._at_once = 1 if look.fixed else AT_ONCE

    def expect(self, blocks: Blocks, numbers: Iterable[int]) -> None:
        """These blocks will be asked for next, in this order."""
        kept = self.kept or ()
        self._reader.expect(d for n in numbers for d in digests_of(blocks, [n]) if d not in kept)

    def seen(self, blocks: Blocks, batch: Batch, packed: bool, always: bool = False) -> Seen | None:
        """The images of some blocks, at the places of tokens that are padded, or `packed` without padding; None where there
        are none, or a black one that is nowhere if there is `always` to be one."""
        digests = digests_of(blocks, batch)
        if not digests:
            return self._stand_in() if always else None
        ids, taken = blocks.ids[batch], blocks.segments[batch] > 0
        found = (ids[taken] if packed else np.where(taken, ids, -1)) == self.form.token_id
        places_M = self._sent(torch.from_numpy(np.flatnonzero(found)))
        if self._inside:
            return Seen(places_M, pixels_N3SS=self._pixels(digests))
        return Seen(places_M, known_NPW=self._known(digests))

    def close(self) -> None:
        self._reader.close()
        if self.kept is not None:
            self.kept.close()

    def _pixels(self, digests: Sequence[str]) -> Tensor:
        return self._sent(torch.from_numpy(np.stack(self._reader.read(digests))))

    def _known(self, digests: Sequence[str]) -> Tensor:
        kept = self.kept
        distinct = list(dict.fromkeys(digests))
        old = [d for d in distinct if kept is not None and d in kept]
        fresh = [d for d in distinct if d not in set(old)]
        made = [self._sent(kept.get(old))] if kept is not None and old else []
        for at in range(0, len(fresh), self._at_once):
            chosen = fresh[at : at + self._at_once]
            made.append(self._look(self._pixels(chosen)))
            if kept is not None:
                kept.put(chosen, made[-1])
        whole_NPW = torch.cat(made)
        places = {d: n for n, d in enumerate(old + fresh)}
        order = [places[d] for d in digests]
        if order == list(range(len(whole_NPW))):
            return whole_NPW
        return whole_NPW.index_select(0, self._sent(torch.tensor(order)))

    @torch.no_grad()
    def _look(self, pixels_N3SS: Tensor) -> Tensor:
        tower = self.causal.model.vision_tower
        training = tower.training
        tower.eval()
        with computing(self.device, self.dtype):
            # The projector rounds to this anyway.
            found = look_at(self.causal, pixels_N3SS).to(self.dtype)
        tower.train(training)
        return found

    def _stand_in(self) -> Seen:
        nowhere = torch.zeros(0, dtype=torch.int64, device=self.device)
        if self._inside:
            return Seen(nowhere, pixels_N3SS=torch.zeros(1, 3, self.form.size, self.form.size, device=self.device))
        config = self.causal.config
        layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
        width = config.vision_config.hidden_size * layers
        return Seen(nowhere, known_NPW=torch.zeros(1, self.form.tokens, width, dtype=self.dtype, device=self.device))

    def _sent(self, value: Tensor) -> Tensor:
        # Only from pinned memory does a copy not wait for the GPU.
        return value.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else value


def digests_of(blocks: Blocks, numbers: Iterable[int]) -> list[str]:
    """The images of some blocks in the order of their places."""
    files = blocks.image_files
    return [files[n] for block in numbers for n in blocks.images_of(int(block)).tolist()] if files else []


def come_again(sets: Sequence[Blocks], config: RunConfig) -> bool:
    """Whether a run asks for an image more than once: in another epoch, at another look, or in another row."""
    if config.schedule.epochs > 1 or config.schedule.max_steps or len(sets) > 1:
        return True
    digests = digests_of(sets[0], range(len(sets[0])))
    return len(set(digests)) < len(digests)
