"""A base as QLoRA sees it (Dettmers et al. 2023): linear layers rounded to bitsandbytes' NF4 and back.

Blocks of 64 numbers share a scale, the largest of them. With double quantisation the scales, less their mean, are rounded
to 8 bits in blocks of 256: this needs all of a tensor's scales, so its codes (half a byte a number) are held meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from services.finetune.convert.shards import Stored
from services.finetune.convert.stream import read_rows, row_bytes
from services.finetune.errors import FailedPrecondition
from services.finetune.modules import PROJECTOR, TOWER, auto_class
from services.finetune.store.port import Store

BLOCK = 64
KINDS: Mapping[str, bool] = {"nf4": True, "nf4-single": False}
"""Our names: with double quantisation or without."""
_SLICE = BLOCK << 16


def quantised_names(config: Mapping[str, Any], tensors: Sequence[Stored]) -> set[str]:
    """The weights that are loaded in 4 bits, by their names in memory, as those of `tensors`: of the language model's linear
    layers, but not the head. FailedPrecondition (MODEL_NOT_TRAINABLE) if transformers does not know the model or calls its
    weights otherwise."""
    import transformers
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    try:
        with torch.device("meta"):
            known = transformers.AutoConfig.for_model(**config)
            model = getattr(transformers, auto_class(config)).from_config(known, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(
            f"transformers cannot load this model: {str(error).splitlines()[0]}", reason="MODEL_NOT_TRAINABLE"
        ) from error
    wanted = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = replace_with_bnb_linear(model, list(get_keys_to_not_convert(model)), wanted)
    names = {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    names -= {n for n in names if n.startswith((TOWER, PROJECTOR))}
    if gone := sorted(names - {t.name for t in tensors}):
        raise FailedPrecondition(
            f"the base has no {gone[0]}, which transformers loads in 4 bits; merge without base_dtype",
            reason="MODEL_NOT_TRAINABLE",
        )
    return names


class Rounded:
    """One weight, rounded to NF4 when it is made."""

    def __init__(self, store: Store, tensor: Stored, double: bool) -> None:
        self._shape, self._count = tensor.shape, tensor.count
        codes, scales, rest = list[Tensor](), list[Tensor](), torch.empty(0)
        step = max(1, _SLICE * tensor.nbytes // tensor.count // row_bytes(tensor))
        for start in range(0, tensor.shape[0], step):
            # Blocks go on from row to row, so what is no whole block waits for the next rows.
            flat = torch.cat([rest, read_rows(store, tensor, start, start + step).float().reshape(-1)])
            whole = flat.numel() if start + step >= tensor.shape[0] else flat.numel() // BLOCK * BLOCK
            rest = flat[whole:].clone()
            if whole:
                code, state = bnb.quantize_4bit(flat[:whole], blocksize=BLOCK, quant_type="nf4")
                codes.append(code.reshape(-1))
                scales.append(state.absmax)
        self._codes, self._scales = torch.cat(codes), torch.cat(scales)
        if double:
            mean = self._scales.mean()
            rounded, state = bnb.quantize_blockwise(self._scales - mean, blocksize=256)
            self._scales = bnb.dequantize_blockwise(rounded, state) + mean

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows as 4-bit layers compute with them, float32."""
        width = self._count // self._shape[0]
        first, last = start * width // BLOCK, -(-stop * width // BLOCK)
        ends = min(last * BLOCK, self._count)
        state = bnb.QuantState(
            absmax=self._scales[first:last],
            shape=torch.Size((ends - first * BLOCK,)),
            dtype=torch.float32,
            blocksize=BLOCK,
            quant_type="nf4",
            code=bnb.get_4bit_type("nf4", device="cpu"),
        )
        flat = bnb.dequantize_4bit(self._codes[first * BLOCK // 2 : -(-ends // 2)].reshape(-1, 1), state)
        skipped = start * width - first * BLOCK
        return flat.reshape(-1)[skipped : skipped + (stop - start) * width].reshape(stop - start, *self._shape[1:])
