"""The engine of encoders: texts become vectors, by transformers; it says nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel

from services.finetune.errors import FailedPrecondition
from services.inference.engines.port import Picture, Sampling, Step

MOST_ANSWERS = 32
BATCH_TOKENS = 8192
"""Of texts that are computed together, padding counted."""


class EncoderEngine:
    """See Engine. `pooling` is mean, cls or max over a text's last states; then vectors may be brought to length 1."""

    def __init__(self, folder: Path, dtype: str, context_length: int, pooling: str, normalize: bool) -> None:
        """FailedPrecondition (MODEL_NOT_SERVABLE)."""
        try:
            model: Any = AutoModel.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                device_map={"": 0} if torch.cuda.is_available() else None,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
            )
        except (ValueError, KeyError, OSError, ImportError, SafetensorError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise FailedPrecondition(
                f"transformers cannot load this encoder: {why}", reason="MODEL_NOT_SERVABLE"
            ) from error
        self._model = model.eval()
        self._pooling, self._normalize = pooling, normalize
        self._turn = asyncio.Lock()
        self.context_length = context_length
        self.vocabulary = int(model.config.vocab_size)
        self.most_adapters, self.most_answers = MOST_ANSWERS + 1, MOST_ANSWERS

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        found: dict[int, list[float]] = {}
        # Texts of like lengths together, so that little is padding.
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        while order:
            longest = 0
            batch: list[int] = []
            while order and max(longest, len(texts[order[0]])) * (len(batch) + 1) <= BATCH_TOKENS:
                longest = max(longest, len(texts[order[0]]))
                batch.append(order.pop(0))
            async with self._turn:
                vectors = await asyncio.to_thread(self._vectors, [texts[n] for n in batch])
            found |= zip(batch, vectors, strict=True)
        return [found[n] for n in range(len(texts))]

    def _vectors(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        longest = max(map(len, texts))
        device = next(self._model.parameters()).device
        mask_BL = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts], device=device)
        ids_BL = torch.tensor([[*t, *[0] * (longest - len(t))] for t in texts], device=device)
        if (pad := self._model.config.pad_token_id) is not None:
            ids_BL[mask_BL == 0] = pad
        with torch.inference_mode():
            states_BLD = self._model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state.float()
        vectors: list[list[float]] = self._pooled(states_BLD, mask_BL).cpu().tolist()
        return vectors

    def _pooled(self, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Reimers & Gurevych 2019, "Sentence-BERT", section 3."""
        if self._pooling == "cls":
            vectors_BD = states_BLD[:, 0]
        elif self._pooling == "max":
            vectors_BD = states_BLD.masked_fill(mask_BL[..., None] == 0, -torch.inf).amax(1)
        else:
            weights_BL1 = mask_BL[..., None].float()
            vectors_BD = (states_BLD * weights_BL1).sum(1) / weights_BL1.sum(1)
        return torch.nn.functional.normalize(vectors_BD, dim=-1) if self._normalize else vectors_BD

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, adapter: str, images: Sequence[Picture] = ()
    ) -> AsyncIterator[Step]:
        raise FailedPrecondition(
            "this model is an encoder, which says nothing; ask for embeddings", reason="GENERATION_UNSUPPORTED"
        )
        yield  # an async generator, as the port has it

    def load(self, key: str, folder: Path) -> None:
        raise FailedPrecondition("an encoder takes no adapters here", reason="MODEL_NOT_SERVABLE")

    def unload(self, key: str) -> None:
        raise NotImplementedError  # nothing is ever loaded

    def cache_use(self) -> float:
        return math.nan  # it keeps nothing between texts

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        pass
