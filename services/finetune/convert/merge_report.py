"""How near a merged model is to its base with the adapter on: both answer for themselves, on the certificate's probes.

Both are computed in float32, so that what is seen is the rounding of the merged weights and no noise of half precision.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from services.finetune.convert.layered import Layered, Read, Source
from services.finetune.convert.shards import Stored
from services.finetune.errors import Cancelled, QuartetError, ResourceExhausted
from services.finetune.modules import is_llava
from services.finetune.prepare.certificate import META, certify
from services.finetune.templates import load_template
from services.finetune.tokenizer import Tokenizer

LIMIT_PARAMETERS = 9_000_000_000
"""Larger models are measured on demand only: it is as much work as answering MOST_TOKENS tokens twice, on the worker's
processors and in float32, and reads both models once."""
FREE_PART = 0.4
"""Nor those of which a part, as float32, would take more of the memory that is free."""
_M_MMAP_THRESHOLD = -3
"""As malloc.h has it."""
MOST_TOKENS = 512
MOST_KL_NATS, LEAST_AGREEMENT = 0.01, 0.98

Report = Mapping[str, Any]


def report(
    wish: str,
    configs: tuple[Mapping[str, Any], Mapping[str, Any]],
    adapter_config: Mapping[str, Any],
    tokenizer: Callable[[], Tokenizer],
    meta: Mapping[str, Any],
    base: Source,
    adapter: Source,
    merged: tuple[Callable[[], Iterable[Stored]], Read],
    tell: Callable[[int], None],
) -> Report:
    """{"kl_nats", "kl_nats_max", "top1_agreement", "tokens"}, or {"not_measured": why}. `wish` is a MergeTask's `report`;
    `configs` are the base's and the merged model's config.json; each pair is a model's tensors and what reads one; `tell`
    is called before each part of a model is read, and may end it all.

    KL(on || merged) is the divergence of the merged model's next-token distribution from that with the adapter on.
    """
    if why := _unwanted(wish, sum(t.count for t in base[0])):
        return {"not_measured": why}
    _give_back()
    try:
        with warnings.catch_warnings(action="ignore"):
            ids = _probes(tokenizer(), meta)
            seen = _picture(configs[0])
            on = _logits(Layered(configs[0], base, (adapter_config, *adapter), tell), ids, seen)
            off = _logits(Layered(configs[1], (merged[0](), merged[1]), tell=tell), ids, seen)
    except ResourceExhausted as error:
        return {"not_measured": error.message}
    except Cancelled:
        raise
    # Whatever a library says of a model: it is merged all the same.
    except (QuartetError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, ImportError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return {"not_measured": f"transformers or PEFT cannot compute it: {said[:300]}"}
    return _compare(on, off)


def is_worrying(found: Report) -> bool:
    """Whether merging changed answers more than rounding does."""
    return bool(found.get("kl_nats", 0.0) > MOST_KL_NATS or found.get("top1_agreement", 1.0) < LEAST_AGREEMENT)


def _unwanted(wish: str, parameters: int) -> str:
    if wish == "never":
        return "not asked for"
    if wish != "always" and parameters > LIMIT_PARAMETERS:
        return f"{parameters / 1e9:.1f} billion parameters are more than {LIMIT_PARAMETERS / 1e9:.0f}; `always` asks for it"
    return ""


def _give_back() -> None:
    """Let what a part of a model took leave memory with it: else the C library keeps it, and in the end the whole model."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _free_bytes() -> int:
    with open("/proc/meminfo") as lines:
        found = next((line for line in lines if line.startswith("MemAvailable:")), "MemAvailable: 0 kB")
    return int(found.split()[1]) * 1024


def _probes(tokenizer: Tokenizer, meta: Mapping[str, Any]) -> list[list[int]]:
    """Token ids of the certificate that the adapter carries, or of a fresh one."""
    found = meta.get(META) or certify(tokenizer, load_template(meta["template"] or "tokenizer", tokenizer))
    ids, left = list[list[int]](), MOST_TOKENS
    for probe in found["probes"]:
        if len(row := probe.get("ids", [])[:left]) > 1:
            ids.append(row)
            left -= len(row)
    if not ids:
        raise ValueError("no probe has tokens")
    return ids


def _picture(config: Mapping[str, Any]) -> tuple[list[int], Tensor] | None:
    """Of a model that sees: the ids of an image, and its pixels [1, 3, S, S], which are noise."""
    if not is_llava(config):
        return None
    side = config["vision_config"]["image_size"]
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return [config["image_token_index"]] * config["image_seq_length"], pixels


def _logits(model: Layered, ids: Sequence[Sequence[int]], seen: tuple[list[int], Tensor] | None) -> Tensor:
    """float32 logits [tokens, vocabulary] of the next token, after each token of each row; before the first row stands what
    is `seen`."""
    if model.largest_bytes > FREE_PART * _free_bytes():
        raise ResourceExhausted(
            f"a part of it takes {model.largest_bytes / 1e9:.1f} GB, more than {FREE_PART:.0%} of the worker's free memory",
            reason="OUT_OF_MEMORY",
        )
    if seen is None:
        return model.logits(ids)
    # By itself: beside a row that is as long as an image all others would be filled up to that.
    image, pixels = seen
    first = model.logits([[*image, *ids[0]]], pixel_values=pixels)[len(image) :]
    return torch.cat([first, model.logits(ids[1:])]) if len(ids) > 1 else first


def _compare(on: Tensor, off: Tensor) -> Report:
    """Of logits. Rounded to three digits: the last ones depend on how many threads add them up."""
    apart = torch.cat([_apart(*pair) for pair in zip(on.split(64), off.split(64), strict=True)])
    agreed = (on.argmax(-1) == off.argmax(-1)).float().mean()
    return {
        "kl_nats": float(f"{float(apart.mean()):.3g}"),
        "kl_nats_max": float(f"{float(apart.max()):.3g}"),
        "top1_agreement": round(float(agreed), 4),
        "tokens": len(on),
    }


def _apart(on: Tensor, off: Tensor) -> Tensor:
    on, off = on.log_softmax(-1), off.log_softmax(-1)
    return (on.exp() * (on - off)).sum(-1).clamp_min(0)
