"""The model under training: how it is loaded, and its loss.

Letters in shapes: B blocks, L tokens, D hidden, V vocabulary, K learned tokens.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.finetune.config import QuantConfig, RunConfig
from services.finetune.devices import cpu_has_bfloat16
from services.finetune.errors import FailedPrecondition
from services.finetune.modules import auto_class, is_llava
from services.finetune.train.attention import attend_by_document, documents
from services.finetune.train.dealt import Dealt
from services.finetune.train.fused import check_covered, decoder_of, layers_of
from services.finetune.train.methods import adapt, check_writable, unfreeze
from services.finetune.train.seeing import UNQUANTISED, Seen, language_of, with_images


def choose_dtype(wanted: str) -> tuple[torch.dtype, str]:
    """(dtype, why). auto takes bfloat16 only where hardware multiplies it: emulated, it is slower than float32."""
    if torch.cuda.is_available():
        good, what = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
    else:
        good, what = cpu_has_bfloat16(), "this processor"
    has = f"{what} has bfloat16" if good else f"{what} has no bfloat16"
    if wanted == "auto":
        return (torch.bfloat16 if good else torch.float32), has
    told = {
        "bfloat16": "as configured" if good else f"as configured, though {has}: float32 would be faster",
        "float16": "as configured, with a loss scale; " + (f"{has}, which needs none" if good else has),
        "float32": "as configured" + (f", though {has}, which would be faster" if good else ""),
    }
    return getattr(torch, wanted), told[wanted]


def load_model(directory: Path, config: RunConfig, dtype: torch.dtype, dealt: Dealt | None = None) -> Any:
    """The base with what is to be trained in float32: fresh LoRA weights, or the base's own. `dealt` takes the layers'
    frozen weights as they come; no device ever holds all of them.

    FailedPrecondition (MODEL_NOT_TRAINABLE), InvalidArgument (CONFIG_VALUE_INVALID); Uncovered, with `dealt` alone.
    """
    import transformers

    check_no_code(directory)
    about = read_config(directory)
    whole, seeing = config.method == "full", is_llava(about)
    kind = getattr(transformers, auto_class(about))
    try:
        device = {"": torch.cuda.current_device()} if torch.cuda.is_available() and not dealt else None
        model = kind.from_pretrained(
            directory,
            # In its own dtype the base needs no memory: it lies in the files' pages, which all ranks of a machine share.
            dtype="auto" if dealt else torch.float32 if whole else dtype,
            quantization_config=None if dealt else quantisation(config.quant, dtype, seeing),
            device_map=device,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            # Fused attention leaves out a cap on its scores (Gemma 2), which a model that has one needs.
            attn_implementation="eager" if caps_attention(directory) else None,
        )
    except (ValueError, KeyError, OSError) as error:
        raise FailedPrecondition(
            f"transformers cannot load this model: {str(error).splitlines()[0]}", reason="MODEL_NOT_TRAINABLE"
        ) from error
    check_packable(model, config)
    if not torch.cuda.is_available() and isolates(model):
        attend_by_document(model)
    if dealt:
        deal(model, config.quant, dtype, dealt)
    keep_layout(model, every=True)
    if not whole:
        model = adapt(model, config)
        if dealt:
            layers_of(causal_of(model), dealt)
        return model
    model = unfreeze(model, config, dtype)
    check_writable(model, directory)
    return model


def deal(causal: Any, quant: QuantConfig, dtype: torch.dtype, dealt: Dealt) -> None:
    """Deal the layers of a base in host memory out, one by one, and bring the rest of it to the device. Uncovered."""
    check_covered(causal)
    decoder = decoder_of(causal)
    layers, decoder.layers = decoder.layers, torch.nn.ModuleList()
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        if quant.bits:
            quantise(layer, quant, dtype, dealt.device)
        dealt.add(layer)
        layer.to(dealt.device)
    for parameter in causal.parameters():
        parameter.data = parameter.data.to(dealt.device, dtype)
    decoder.layers = layers
    causal.to(dealt.device)  # buffers keep their dtype
    if quant.bits:
        causal.is_loaded_in_4bit = True  # as PEFT asks


def quantise(layer: torch.nn.Module, quant: QuantConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Put 4-bit layers in the place of all linear ones, as transformers' loading does."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for name, old in [(n, m) for n, m in layer.named_modules() if type(m) is torch.nn.Linear]:
        kinds: dict[str, Any] = {"compress_statistics": quant.double_quant, "quant_type": quant.kind}
        with torch.device("meta"):
            new: Any = Linear4bit(old.in_features, old.out_features, False, dtype, **kinds)
        fresh: Any = Params4bit(old.weight.data, requires_grad=False, module=new, **kinds)
        new.weight = fresh.to(device)
        new.bias = old.bias
        layer.set_submodule(name, new)


def quantisation(quant: QuantConfig, dtype: torch.dtype, seeing: bool) -> Any:
    """What transformers is told, None of weights that stay as they are. Of a model that sees, the language model alone is
    quantised."""
    from transformers import BitsAndBytesConfig

    left = list(UNQUANTISED) if seeing else None  # None leaves the output head to transformers
    if quant.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
    if quant.bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=left,
            bnb_4bit_quant_type=quant.kind,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def causal_of(model: Any) -> Any:
    """The causal model itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def computing(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Within this, products are in `dtype`, whatever the weights are kept in."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def keep_layout(model: Any, every: bool) -> None:
    """Forbid bitsandbytes to repack 4-bit layers in place at their first evaluation on a CPU with AVX-512 bfloat16.

    Repacking rounds the blocks' scales to bfloat16, so a run that stopped for samples would go on from another base than
    one resumed; it also fails where rows are no whole blocks. `every` layer, or only those that it fails on.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            fits = layer.in_features % 64 == 0 and layer.out_features % 32 == 0
            layer.support_avx512bf16_for_cpu &= fits and not every


def check_no_code(directory: Path) -> None:
    """Refuse a model that asks for code of its own, whatever flag is given to whom."""
    if not (directory / "config.json").is_file():
        raise FailedPrecondition(
            "the base has no config.json, so it is no whole model; an adapter must be merged into its base first",
            reason="MODEL_NOT_TRAINABLE",
        )
    if "auto_map" in read_config(directory):
        raise FailedPrecondition(
            "the model's config.json has auto_map: it wants to run code of its own; use a model that transformers knows",
            reason="MODEL_NOT_TRAINABLE",
        )


def read_config(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def caps_attention(directory: Path) -> bool:
    """Whether the model's attention scores have a cap."""
    config = read_config(directory)
    return bool(config.get("attn_logit_softcapping") or config.get("text_config", {}).get("attn_logit_softcapping"))


def isolates(causal: Any) -> bool:
    """Whether a mask and positions can keep the samples of a block apart.

    They cannot where layers carry a state from token to token, or make their own positions from a padding mask.
    """
    kinds = set(getattr(causal.config.get_text_config(), "layer_types", None) or ())
    inner = language_of(causal)
    masked = kinds <= {"full_attention", "sliding_attention"} and not inner._is_stateful
    return masked and "position_ids" in inspect.signature(inner.forward).parameters


def check_packable(causal: Any, config: RunConfig) -> None:
    """FailedPrecondition (MODEL_NOT_TRAINABLE) if rows are to share blocks in a model that would mix them up."""
    if config.data.pack and not isolates(causal):
        raise FailedPrecondition(
            f"{type(causal).__name__} cannot keep rows of one block apart; set data.pack to false",
            reason="MODEL_NOT_TRAINABLE",
        )


def trainable(model: Any) -> dict[str, Tensor]:
    """The trainable parameters by name, in a fixed order."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def summed_loss(
    model: Any,
    ids_BL: Tensor,
    labels_BL: Tensor,
    positions_BL: Tensor,
    segments_BL: Tensor,
    *,
    dtype: torch.dtype | None = None,
    call: Any = None,
    seen: Seen | None = None,
) -> Tensor:
    """Cross entropy summed over the learned tokens, float32; computed in `dtype`, or else in the base's own. `call` runs the
    causal model, if it is not to run itself; it takes `seen`, the images of the blocks, as with_images does.

    Samples of one block do not see each other. Logits are computed for learned tokens only: with a large vocabulary
    they are most of the cost, and most tokens are prompts. `labels_BL` stays in host memory, so that finding the
    learned tokens does not wait for the GPU.
    """
    causal = causal_of(model)
    device = ids_BL.device
    # Position t predicts the label at t + 1.
    row_K, place_K = (labels_BL[:, 1:] >= 0).nonzero(as_tuple=True)
    where_K = (row_K * labels_BL.shape[1] + place_K).to(device, non_blocking=True)
    wanted_K = labels_BL[row_K, place_K + 1].to(device, non_blocking=True)
    given: dict[str, Any] = {"seen": seen} if seen else {}
    if isolates(causal):
        given |= {"attention_mask": masks(causal, segments_BL), "position_ids": positions_BL}
        given |= documents(causal, segments_BL)
    # The head is cut short from outside: what a model does to its logits afterwards (caps, scales) stays its own.
    head = causal.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1).index_select(0, where_K)[None],))
    try:
        with computing(device, dtype or causal.dtype):
            call = call or (with_images(causal) if seen else causal)
            logits_KV = call(input_ids=ids_BL, use_cache=False, **given).logits[0]
    finally:
        hook.remove()
    return torch.nn.functional.cross_entropy(logits_KV.float(), wanted_K, reduction="sum")


def masks(causal: Any, segments_BL: Tensor) -> Tensor | dict[str, Tensor]:
    """The masks of a model's kinds of layers, in the form that its attention takes.

    transformers uses a mask of four dimensions as it is, so a sliding window must be in it already.
    """
    config = causal.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    seen = visible(segments_BL)
    near = visible(segments_BL, window) if window else seen
    if config._attn_implementation == "eager":
        # Eager attention adds its mask to the scores.
        seen, near = (
            torch.zeros_like(m, dtype=causal.dtype).masked_fill(~m, torch.finfo(causal.dtype).min) for m in (seen, near)
        )
    if "sliding_attention" in kinds:
        return {"full_attention": seen, "sliding_attention": near}
    return seen if kinds else near


def visible(segments_BL: Tensor, window: int = 0) -> Tensor:
    """bool [B, 1, L, L]: what each token sees, which is its own sample up to itself, or the last `window` tokens of
    that; padding sees padding."""
    length = segments_BL.shape[1]
    same = segments_BL[:, :, None] == segments_BL[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    if window:
        causal = causal.triu(1 - window)
    return (same & causal)[:, None]
