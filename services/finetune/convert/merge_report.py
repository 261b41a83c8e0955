"""How near a merged model is to its base with the adapter on: both answer for themselves, on the certificate's probes.

Both are computed in float32, so that what is seen is the rounding of the merged weights and no noise of half precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from services.finetune.convert.modules import auto_class, is_llava
from services.finetune.convert.shards import Stored
from services.finetune.errors import QuartetError
from services.finetune.prepare.certificate import META, certify
from services.finetune.templates import load_template
from services.finetune.tokenizer import Tokenizer

LIMIT_BYTES = 1 << 30
"""Larger models, in float32, are not measured: loading them twice takes far longer, and more memory, than merging them."""
FREE_PART = 0.4
"""Nor those that need more of the memory that is free: a model and its tensors are there side by side."""
MOST_TOKENS = 512
MOST_KL_NATS, LEAST_AGREEMENT = 0.01, 0.98

Read = Callable[[Stored], Tensor]
Report = Mapping[str, Any]


def report(
    configs: tuple[Mapping[str, Any], Mapping[str, Any]],
    adapter_config: Mapping[str, Any],
    tokenizer: Callable[[], Tokenizer],
    meta: Mapping[str, Any],
    base: tuple[Iterable[Stored], Read],
    adapter: tuple[Iterable[Stored], Read],
    merged: tuple[Callable[[], Iterable[Stored]], Read],
) -> Report:
    """{"kl_nats", "kl_nats_max", "top1_agreement", "tokens"}, or {"not_measured": why}. `configs` are the
    base's and the merged model's config.json; each pair is a model's tensors and what reads one.

    KL(on || merged) is the divergence of the merged model's next-token distribution from that with the adapter on.
    """
    size = 4 * sum(t.count for t in base[0])
    if why := _too_large(size):
        return {"not_measured": why}
    try:
        with warnings.catch_warnings(action="ignore"):
            ids = _probes(tokenizer(), meta)
            seen = _picture(configs[0])
            on = _logits(_model(configs[0], *base), ids, seen, (adapter_config, *adapter))
            off = _logits(_model(configs[1], merged[0](), merged[1]), ids, seen)
    # Whatever a library says of a model: it is merged all the same.
    except (QuartetError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, ImportError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return {"not_measured": f"transformers or PEFT cannot load it: {said[:300]}"}
    return _compare(on, off)


def is_worrying(found: Report) -> bool:
    """Whether merging changed answers more than rounding does."""
    return bool(found.get("kl_nats", 0.0) > MOST_KL_NATS or found.get("top1_agreement", 1.0) < LEAST_AGREEMENT)


def _too_large(size: int) -> str:
    if size > LIMIT_BYTES:
        return f"{size / 1e9:.1f} GB in float32 are more than the limit of {LIMIT_BYTES / 1e9:.1f} GB"
    if size > FREE_PART * _free_bytes():
        return f"{size / 1e9:.1f} GB in float32 are more than {FREE_PART:.0%} of the worker's free memory"
    return ""


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


def _model(config: Mapping[str, Any], tensors: Iterable[Stored], read: Read) -> Any:
    """A model in float32, of tensors that come one after another."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(**config)
    state = {t.name: read(t).float() for t in tensors}
    with torch.device("meta"):
        kind: Any = type(auto_class(config).from_config(known, trust_remote_code=False))
    # Without a folder, which only the class itself takes and not its finder.
    loaded: Any = kind.from_pretrained(
        None, config=known, state_dict=state, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    model, told = loaded
    if told["missing_keys"]:
        raise ValueError(f"{sorted(told['missing_keys'])[0]} is missing")
    return model.eval()


def _picture(config: Mapping[str, Any]) -> tuple[list[int], Tensor] | None:
    """Of a model that sees: the ids of an image, and its pixels [1, 3, S, S], which are noise."""
    if not is_llava(config):
        return None
    side = config["vision_config"]["image_size"]
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return [config["image_token_index"]] * config["image_seq_length"], pixels


@torch.inference_mode()
def _logits(
    model: Any,
    ids: list[list[int]],
    seen: tuple[list[int], Tensor] | None = None,
    adapter: tuple[Mapping[str, Any], Iterable[Stored], Read] | None = None,
) -> Tensor:
    """float32 log-probabilities [tokens, vocabulary] of the next token, after each token of each row; before the first row
    stands what is `seen`."""
    if adapter is not None:
        import peft

        config, tensors, read = adapter
        known = {k: v for k, v in config.items() if k in peft.LoraConfig.__dataclass_fields__}
        model = peft.get_peft_model(
            model, peft.LoraConfig(**{**known, "inference_mode": True, "init_lora_weights": True})
        )
        told: Any = peft.set_peft_model_state_dict(model, {t.name: read(t).float() for t in tensors})
        if told.unexpected_keys:
            raise ValueError(f"{told.unexpected_keys[0]} has no place")
        model.eval()
    found = []
    for n, row in enumerate(ids):
        image, pixels = seen if seen is not None and n == 0 else ([], None)
        more = {} if pixels is None else {"pixel_values": pixels}
        logits = model(input_ids=torch.tensor([[*image, *row]]), **more).logits[0]
        found.append(logits[len(image) :].float().log_softmax(-1))
    return torch.cat(found)


def _compare(on: Tensor, off: Tensor) -> Report:
    """Rounded to three digits: the last ones depend on how many threads add them up."""
    apart = (on.exp() * (on - off)).sum(-1).clamp_min(0)
    agreed = (on.argmax(-1) == off.argmax(-1)).float().mean()
    return {
        "kl_nats": float(f"{float(apart.mean()):.3g}"),
        "kl_nats_max": float(f"{float(apart.max()):.3g}"),
        "top1_agreement": round(float(agreed), 4),
        "tokens": len(on),
    }
