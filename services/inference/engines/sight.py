"""What the transformers engine has seen: features of images by digest, so that a talk about an image looks at it once."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from services.finetune.vision import pixels, read_form
from services.inference.engines.images import DECODING
from services.inference.engines.port import Picture

CACHE_BYTES = 256 << 20


class Sight:
    """The images of the LLaVA model in `folder`. An adapter sees with a tower and a projector of its own, so features are
    kept for each. Safe for threads."""

    def __init__(self, folder: Path) -> None:
        form = read_form(folder)
        assert form is not None  # it is LLaVA
        self._form, self.token = form, form.token_id
        self._kept: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._bytes, self._guard = 0, threading.Lock()

    def pixels(self, picture: Picture) -> Tensor:
        """[3, S, S], float32."""
        with DECODING:
            return torch.from_numpy(pixels(io.BytesIO(picture.data), self._form))

    def known(self, digest: str, adapter: str) -> Tensor | None:
        """Features [N, D] that were kept, or None."""
        with self._guard:
            found = self._kept.get((digest, adapter))
            if found is not None:
                self._kept.move_to_end((digest, adapter))
            return found

    def keep(self, digest: str, adapter: str, features_ND: Tensor) -> Tensor:
        """Keep features; those that were used longest ago leave."""
        with self._guard:
            if (digest, adapter) not in self._kept:
                self._kept[digest, adapter] = features_ND
                self._bytes += features_ND.nbytes
            while self._bytes > CACHE_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return features_ND
