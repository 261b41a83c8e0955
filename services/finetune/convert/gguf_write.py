"""Safetensors to GGUF (version 3), tensor by tensor, for llama.cpp.

    architecture                      there      what differs
    Llama, Mistral                    llama      rows of q and k: pairs of a rotation lie side by side
    Qwen2, Qwen3                      qwen2, 3   names only
    Gemma, Gemma 2, Gemma 3           gemma, …   norms hold 1 + weight
    GLM (what ChatGLM becomes here)   chatglm    names only

Which blocks a mix such as Q4_K_M takes for which tensor is llama.cpp's own rule (`llama_tensor_get_type` in
src/llama-quant.cpp), without an importance matrix. Blocks are made by gguf's and libgguf's quantisers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.finetune.convert.gguf_tokenizer import add_tokenizer
from services.finetune.convert.shards import Stored, as_torch, read_folder
from services.finetune.errors import FailedPrecondition, InvalidArgument

_CHUNK_NUMBERS = 16 << 20
"""Numbers made into blocks at a time."""
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17,
               "q6_k": 18}  # fmt: skip
_FINER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True, slots=True)
class _Architecture:
    gguf: str
    permuted: bool = False
    """Rows of q and k go from halves (transformers) to pairs (llama.cpp)."""
    norm_shift: float = 0.0


ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture("LLAMA", permuted=True),
    "MistralForCausalLM": _Architecture("LLAMA", permuted=True),
    "Qwen2ForCausalLM": _Architecture("QWEN2"),
    "Qwen3ForCausalLM": _Architecture("QWEN3"),
    "GemmaForCausalLM": _Architecture("GEMMA", norm_shift=1.0),
    "Gemma2ForCausalLM": _Architecture("GEMMA2", norm_shift=1.0),
    "Gemma3ForCausalLM": _Architecture("GEMMA3", norm_shift=1.0),
    "GlmForCausalLM": _Architecture("CHATGLM"),
}


def check_supported(architecture: str) -> None:
    """FailedPrecondition (ARCHITECTURE_UNSUPPORTED)."""
    if architecture not in ARCHITECTURES:
        raise FailedPrecondition(
            f"{architecture} is not among the architectures that become GGUF here: {', '.join(ARCHITECTURES)}; export "
            "another form",
            reason="ARCHITECTURE_UNSUPPORTED",
            metadata={"architecture": architecture},
        )


def write_gguf(
    folder: Path,
    out: Path,
    wanted: str,
    name: str,
    template: str | None,
    tell: Callable[[int, int], None],
    warn: Callable[[str], None],
) -> None:
    """Write the model in `folder` into the file `out`; `wanted` is a GgufType, `template` the chat template's text.

    FailedPrecondition (ARCHITECTURE_UNSUPPORTED, MODEL_UNSUPPORTED, TOKENIZER_UNSUPPORTED, LIBRARY_MISSING),
    InvalidArgument (NUMBERS_TOO_LARGE) for float16.
    """
    import gguf
    import numpy as np
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    architecture = (config.architectures or [""])[0]
    check_supported(architecture)
    about = ARCHITECTURES[architecture]
    arch = gguf.MODEL_ARCH[about.gguf]
    writer: Any = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[wanted])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    factors = _add_shape(writer, about, config, warn)
    tensors = read_folder(folder)
    embeddings = next(t for t in tensors if t.name.endswith("embed_tokens.weight"))
    add_tokenizer(writer, folder, embeddings.shape[0], warn, template)
    plan = _plan(tensors, arch, config, wanted)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor in plan:
        writer.add_tensor_info(tensor.name, tensor.source.shape, np.float32, tensor.nbytes, raw_dtype=tensor.blocks)
    try:
        writer.write_header_to_file(out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        _write_data(writer.fout[0], plan, about, config, tell)
    finally:
        writer.close()


# ---------------------------------------------------------------------------------------------- shape


def _add_shape(writer: Any, about: _Architecture, config: Any, warn: Callable[[str], None]) -> Any:
    """Sizes and constants; the factors of Llama 3's rotation if it has them, else None."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if about.gguf in ("GEMMA2", "GEMMA3"):
        _add_gemma(writer, about, config, head)
    elif getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
        warn(f"llama.cpp attends to the whole text, not to the last {config.sliding_window} tokens of it")
    return _add_rotation(writer, config, head, rope, warn)


def _add_gemma(writer: Any, about: _Architecture, config: Any, head: int) -> None:
    # llama.cpp knows these from the architecture alone.
    every = 2 if about.gguf == "GEMMA2" else 6
    kinds = ["full_attention" if n % every == 0 else "sliding_attention" for n in range(1, len(config.layer_types) + 1)]
    if list(config.layer_types) != kinds or config.query_pre_attn_scalar != head:
        raise _unlike("its layers attend, or its queries are scaled, in a way that llama.cpp does not know")
    writer.add_sliding_window(config.sliding_window)
    if about.gguf == "GEMMA2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_rotation(writer: Any, config: Any, head: int, rope: Mapping[str, Any], warn: Callable[[str], None]) -> Any:
    import gguf

    kind = rope.get("rope_type", "default")
    if kind == "dynamic":
        # It changes nothing up to the length that it was trained for, and llama.cpp has no equal beyond.
        warn(f"beyond {config.max_position_embeddings} tokens llama.cpp rotates otherwise than dynamic scaling")
    elif kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind == "llama3":
        return _llama3_factors(head, rope)
    elif kind != "default":
        raise _unlike(f"its rotation is of type {kind}")
    return None


def _llama3_factors(head: int, rope: Mapping[str, Any]) -> Any:
    """By what llama.cpp divides each frequency: transformers' own for this kind, told as ratios."""
    import numpy as np

    base = rope["rope_theta"] ** -(np.arange(0, head, 2, dtype=np.float32) / head)
    waves = 2 * np.pi / base
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = np.clip((old / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _unlike(why: str) -> FailedPrecondition:
    return FailedPrecondition(f"the model has no equal in GGUF: {why}", reason="MODEL_UNSUPPORTED")


# ---------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True, slots=True)
class _Planned:
    name: str
    source: Stored
    blocks: Any
    nbytes: int


def _plan(tensors: Sequence[Stored], arch: Any, config: Any, wanted: str) -> list[_Planned]:
    import gguf

    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    planned = []
    for tensor in tensors:
        if tensor.name.endswith("inv_freq") or (tied and tensor.name == "lm_head.weight"):
            continue
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise _unlike(f"GGUF has no name for the tensor {tensor.name}")
        blocks = gguf.GGMLQuantizationType[_blocks(name, tensor.shape, wanted, config.num_hidden_layers, tied)]
        size, nbytes = gguf.GGML_QUANT_SIZES[blocks]
        planned.append(_Planned(name, tensor, blocks, tensor.count // size * nbytes))
    return planned


def _blocks(name: str, shape: Sequence[int], wanted: str, layers: int, tied: bool) -> str:
    """The kind of block for a tensor."""
    if len(shape) < 2:
        return "F32"
    kind = wanted.upper().removesuffix("_M").removesuffix("_S")
    if "_K" in kind:
        kind = _mixed(name, kind, wanted, layers, tied)
    if "_K" in kind and shape[-1] % 256:
        kind = _FINER[kind]
    return "F16" if "Q" in kind and shape[-1] % 32 else kind


def _mixed(name: str, kind: str, wanted: str, layers: int, tied: bool) -> str:
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q6_K"
    found = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight", name)
    if found is None:
        return kind
    layer, eighth = int(found[1]), layers // 8
    if wanted.endswith("_m"):
        more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        return "Q6_K" if more else kind
    few = layer < (4 if found[2] == "attn_v" else eighth)
    return "Q5_K" if wanted == "q4_k_s" and few else kind


def _write_data(
    file: Any, plan: Sequence[_Planned], about: _Architecture, config: Any, tell: Callable[[int, int], None]
) -> None:
    total, done = sum(t.nbytes for t in plan), 0
    tell(0, total)
    file.write(bytes(-file.tell() % 32))
    for tensor in plan:
        wrote = sum(file.write(piece) for piece in _pieces(tensor, about, config))
        if wrote != tensor.nbytes:
            raise RuntimeError(f"{tensor.name} came out with {wrote} bytes, not {tensor.nbytes}")
        # All offsets are multiples of 32.
        file.write(bytes(-file.tell() % 32))
        done += tensor.nbytes
        tell(done, total)


def _pieces(tensor: _Planned, about: _Architecture, config: Any) -> Iterator[memoryview]:
    """A tensor's blocks, some rows at a time."""
    value, name = as_torch(tensor.source), tensor.source.name
    if about.permuted and (found := re.search(r"\.([qk])_proj\.", name)):
        heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        pairs = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        value = pairs.transpose(1, 2).reshape(value.shape)
    if about.norm_shift and name.endswith("norm.weight"):
        value = value.float() + about.norm_shift
    rows = value.reshape(-1, value.shape[-1])
    step = max(_CHUNK_NUMBERS // rows.shape[-1], 1)
    for at in range(0, rows.shape[0], step):
        yield memoryview(_quantise(rows[at : at + step].float().numpy(), tensor).reshape(-1)).cast("B")


def _quantise(rows: Any, tensor: _Planned) -> Any:
    import gguf
    import numpy as np

    if tensor.blocks.name.endswith("_K"):
        try:
            import libgguf
        except ImportError as error:
            raise FailedPrecondition(
                "blocks of the kinds Q4_K, Q5_K and Q6_K want the library libgguf: pip install 'quartet[export]' where "
                "workers run, or choose q8_0",
                reason="LIBRARY_MISSING",
                metadata={"library": "libgguf"},
            ) from error
        return libgguf.quantize_rows(rows, int(tensor.blocks))
    if tensor.blocks.name == "F16" and np.abs(rows).max(initial=0) > 65504:
        raise InvalidArgument(
            f"{tensor.source.name} has numbers too large for float16; choose bf16, f32 or q8_0",
            reason="NUMBERS_TOO_LARGE",
        )
    return np.ascontiguousarray(gguf.quants.quantize(rows, tensor.blocks))
