"""GGUF to safetensors: weights are dequantised once; tokenizer and chat template come along."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.finetune.errors import Cancelled, FailedPrecondition, InvalidArgument


def convert_gguf(path: Path, out: Path, dtype: str, stop: threading.Event) -> None:
    """Write config, weights (in `dtype`), tokenizer and chat template of a GGUF file into the folder `out`.

    `path` must lie in a folder of its own: transformers also reads what lies beside it.
    InvalidArgument (GGUF_MALFORMED), FailedPrecondition (MODEL_UNSUPPORTED) if transformers cannot read it,
    Cancelled (STOPPED) between its parts.
    """
    with _remembered():
        pre = _pre_tokenizer(path)
        _refuse_biases(path)
        try:
            tokenizer, model = _load(path, stop)
        except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError) as error:
            raise FailedPrecondition(
                f"{path.name} cannot be read: {(str(error).splitlines() or ['unknown'])[0]}",
                reason="MODEL_UNSUPPORTED",
            ) from error
    _save(model, tokenizer, out, dtype)
    _restore_digits(pre, tokenizer)
    tokenizer.save_pretrained(out)
    if stop.is_set():
        raise _stopped()


def _load(path: Path, stop: threading.Event) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, options = path.parent, {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if stop.is_set():
        raise _stopped()
    config = AutoConfig.from_pretrained(folder, **options)
    # Without dequantize, transformers keeps some architectures packed, and packed weights are no safetensors model.
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    )
    if stop.is_set():
        raise _stopped()
    return tokenizer, model


def _save(model: Any, tokenizer: Any, out: Path, dtype: str) -> None:
    import torch
    from transformers import GenerationConfig

    config = model.config
    # transformers marks the model as quantised and then refuses to save it; its weights are plain by now.
    for name in ("quantization_config", "_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    wanted: torch.dtype = getattr(torch, dtype)
    # On the meta device a fresh model costs nothing; every weight is assigned to it.
    with torch.device("meta"):
        fresh: Any = type(model)(config)
    fresh.load_state_dict({k: v.to(wanted) for k, v in model.state_dict().items()}, assign=True)
    fresh.tie_weights()
    fresh.config.dtype = wanted
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fresh.generation_config = GenerationConfig(**ids)
    fresh.save_pretrained(out)


def _pre_tokenizer(path: Path) -> str:
    """The name of the file's pre-tokenizer; also the check that it is a whole GGUF file at all."""
    import gguf

    try:
        field = gguf.GGUFReader(str(path)).get_field("tokenizer.ggml.pre")
        return bytes(field.parts[field.data[0]]).decode() if field else ""
    except Exception as error:  # the parser checks little, so damaged bytes raise whatever they happen to
        raise InvalidArgument(
            f"{path.name} is no whole GGUF file: {error}; fetch it again", reason="GGUF_MALFORMED"
        ) from error


def _refuse_biases(path: Path) -> None:
    """transformers reads GGUF's llama without the biases that InternLM's have, and says nothing."""
    import gguf

    reader = gguf.GGUFReader(str(path))
    field = reader.get_field("general.architecture")
    name = bytes(field.parts[field.data[0]]).decode() if field else ""
    lost = [t.name for t in reader.tensors if t.name.endswith(".bias")]
    if name == "llama" and lost:
        raise FailedPrecondition(
            f"{path.name} is a Llama with biases ({lost[0]}), which transformers would leave out; import the safetensors "
            "that it was made from",
            reason="MODEL_UNSUPPORTED",
        )


def _restore_digits(pre: str, tokenizer: Any) -> None:
    """GGUF names its pre-tokenizer; transformers ignores the name and forgets that smollm splits digits."""
    from tokenizers import pre_tokenizers

    if pre == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


@contextlib.contextmanager
def _remembered() -> Iterator[None]:
    """Let transformers parse the file once, not four times, and build one table of names, not one for each module:
    for a model of 135M weights that is 25 s of 40. Both are only read."""
    import gguf

    library: Any = gguf
    reader, table = library.GGUFReader, library.get_tensor_name_map
    try:
        library.GGUFReader = functools.lru_cache(maxsize=1)(reader)
        library.get_tensor_name_map = functools.lru_cache(maxsize=1)(table)
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = reader, table


def _stopped() -> Cancelled:
    return Cancelled("stopped before anything was kept", reason="STOPPED")
