"""QUANTIZE: a whole model with smaller weights, linear layer by linear layer; what is not quantised keeps its bytes.

    nf4, fp4, int8     bitsandbytes: blocks of 64 with nested scales (Dettmers et al. 2023), rows (Dettmers et al. 2022)
    fp8, int4, gptq    compressed-tensors, which vLLM and transformers read; see compressed.py and gptq.py

Embeddings, output head and norms stay as they are. Memory is some copies of the largest layer; for gptq the whole model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.finetune.convert.compressed import compressed_config, fp8, int4
from services.finetune.convert.importing import read_json
from services.finetune.convert.reshard import made_from, whole
from services.finetune.convert.rest import copy_rest, write_template
from services.finetune.convert.shards import (
    NAMES,
    Stored,
    as_torch,
    plan,
    progress,
    raw,
    read_file_header,
    read_folder,
    write,
)
from services.finetune.errors import FailedPrecondition
from services.finetune.modules import is_llava
from services.finetune.orders import QuantizeTask
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import Manifest, Parent, materialise, publish_directory

SHARD_BYTES = 2_000_000_000
Quantise = Callable[[str, Tensor], Mapping[str, Tensor]]
"""(a linear layer's name, its weight [out, in]) -> what is stored in its place, by what follows the layer's name."""


def quantize(task: QuantizeTask, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    """Do a QuantizeTask; the digest of a "quantized" artifact, with the model's template and certificate.

    FailedPrecondition (MODEL_NOT_WHOLE, MODEL_UNSUPPORTED, LIBRARY_MISSING), for gptq also what `prepare` raises,
    Cancelled (STOPPED).
    """
    source = whole(attempt, task.model)
    folder = materialise(attempt.store, source, workdir / "source")
    if is_llava(read_json(folder / "config.json")):
        raise FailedPrecondition(
            "a LLaVA model is not quantised as a whole: serve it as it is, or with bits=4 by the transformers engine",
            reason="MODEL_UNSUPPORTED",
        )
    layers = linear_layers(folder)
    with _libraries(task.method):
        quantise, config = _method(task, source, folder, layers, attempt, stop, workdir)
    out = workdir / "model"
    out.mkdir()
    _write(read_folder(folder), layers, quantise, out, workdir / "parts", progress(attempt, stop))
    copy_rest(source, folder, out)
    write_template(folder, out, source.meta)
    described = {**read_json(folder / "config.json"), "quantization_config": config}
    (out / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True))
    parents = [*made_from(task.model)]
    if task.calibration is not None:
        parents.append(Parent("dataset", task.calibration.digest, task.calibration.name))
    meta = {**source.meta, "quantization": task.method}
    return publish_directory(attempt.store, "quantized", out, parents, meta)


def linear_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """Name and shape [out, in] of the layers to quantise: all linear ones but the output head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def _method(
    task: QuantizeTask,
    source: Manifest,
    folder: Path,
    layers: Mapping[str, tuple[int, int]],
    attempt: Attempt,
    stop: threading.Event,
    workdir: Path,
) -> tuple[Quantise, dict[str, Any]]:
    """How a layer is quantised, and what config.json says of it."""
    dtype = source.meta["dtype"]
    if task.method in ("nf4", "fp4"):
        return _four_bits(task.method), _bitsandbytes(task.method, dtype)
    if task.method == "int8":
        return _eight_bits, _bitsandbytes("int8", dtype)
    if task.method == "gptq":
        from services.finetune.convert.gptq import solve

        found = solve(task, source, folder, layers, attempt, stop, workdir)
        return lambda name, weight: found.pop(name), compressed_config("int4", layers)
    return (fp8 if task.method == "fp8" else int4), compressed_config(task.method, layers)


# ---------------------------------------------------------------------------------------------- writing


def _write(
    tensors: Sequence[Stored],
    layers: Mapping[str, tuple[int, int]],
    quantise: Quantise,
    out: Path,
    parts: Path,
    tell: Callable[[int, int], None],
) -> None:
    """Quantise one layer after the other into small files, then copy all into the model's own: so their sizes are known
    before the first header is written, and no more than one layer is in memory."""
    parts.mkdir()
    made: list[Stored] = []
    total, done = sum(t.nbytes for t in tensors), 0
    left = set(layers)
    for n, tensor in enumerate(tensors):
        name = tensor.name.removesuffix(".weight")
        if name in left and tensor.name.endswith(".weight"):
            left.remove(name)
            made += _quantised(name, tensor, quantise, parts / f"{n}.safetensors")
        else:
            made.append(tensor)
        done += tensor.nbytes
        # The copy afterwards is a part of the work, if a small one: it ends what this begins.
        tell(done * 9 // 10, total)
    if left:
        raise FailedPrecondition(
            f"the weights are stored otherwise than the model has them ({min(left)} is no tensor of its own), so they are "
            "not quantised here",
            reason="MODEL_UNSUPPORTED",
        )
    found = {t.name: t for t in made}
    size, copied = sum(t.nbytes for t in made), 0

    def count(tensor: Stored) -> None:
        nonlocal copied
        copied += tensor.nbytes
        tell(total * 9 // 10 + total // 10 * copied // size, total)

    write(out, plan((t.cast("") for t in made), SHARD_BYTES), lambda t: raw(found[t.name]), count)
    tell(total, total)


def _quantised(name: str, tensor: Stored, quantise: Quantise, path: Path) -> list[Stored]:
    from safetensors.torch import save_file

    if tensor.dtype not in NAMES:
        raise FailedPrecondition(f"{tensor.name} is {tensor.dtype}, not a plain float", reason="MODEL_UNSUPPORTED")
    with torch.no_grad():
        values = quantise(name, as_torch(tensor))
    save_file({f"{name}.{key}": value.contiguous().cpu() for key, value in values.items()}, path)
    return read_file_header(path)


# ---------------------------------------------------------------------------------------------- bitsandbytes


def _four_bits(kind: str) -> Quantise:
    from bitsandbytes.functional import quantize_4bit

    def quantise(name: str, weight: Tensor) -> Mapping[str, Tensor]:
        packed, state = quantize_4bit(_on_device(weight), blocksize=64, compress_statistics=True, quant_type=kind)
        return {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}

    return quantise


def _eight_bits(name: str, weight: Tensor) -> Mapping[str, Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant

    # By way of float16, as bitsandbytes itself does it in loading.
    rows, scales, _ = int8_vectorwise_quant(_on_device(weight).half())
    return {"weight": rows, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def _bitsandbytes(kind: str, dtype: str) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        config: Any = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    return dict(config.to_dict())


def _on_device(weight: Tensor) -> Tensor:
    return weight.cuda() if torch.cuda.is_available() else weight


@contextmanager
def _libraries(method: str) -> Iterator[None]:
    name = "bitsandbytes" if method in ("nf4", "fp4", "int8") else "compressed_tensors"
    try:
        __import__(name)
    except ImportError as error:
        extra = "worker" if name == "bitsandbytes" else "quantize"
        raise FailedPrecondition(
            f"the method {method} wants the library {name}: pip install 'quartet[{extra}]' where workers run",
            reason="LIBRARY_MISSING",
            metadata={"library": name},
        ) from error
    yield
