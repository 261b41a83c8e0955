"""A family's weights under native names, tensor by tensor: what a fused module holds is taken apart while it is copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.finetune.convert.families import Family, Part, Rows, heads_of, is_derived, native_parts
from services.finetune.convert.shards import NAMES, WIDTHS, Stored, as_torch, cast_bytes, plan, to_bytes, write
from services.finetune.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class _Made:
    """A native tensor: where it comes from, and how."""

    source: Stored
    change: Callable[[Any], Any] | None


def write_native(
    family: Family | None,
    config: Mapping[str, Any],
    tensors: Sequence[Stored],
    out: Path,
    dtype: str,
    limit: int,
    tell: Callable[[int, int], None],
) -> None:
    """Write a family's (or, with None, a native model's) weights into `out`; `config` is the native config, and `dtype` ""
    keeps the source's.

    InvalidArgument (WEIGHTS_INCOMPLETE) naming the first tensor that is missing, unknown or of another shape.
    """
    shapes = expected_shapes(dict(config))
    made = _plan_tensors(family, config, tensors)
    check_names(made, shapes, bool(config.get("tie_word_embeddings")))
    targets = [_target(name, m.source, shapes.get(name, m.source.shape)).cast(dtype) for name, m in made.items()]
    total, done = sum(t.nbytes for t in targets), 0

    def data(target: Stored) -> Iterable[bytes | memoryview]:
        part = made[target.name]
        if part.change is None:
            if part.source.shape != target.shape:
                raise _wrong(target.name, f"has shape {list(part.source.shape)}, not {list(target.shape)}")
            return cast_bytes(part.source, dtype)
        try:
            value = part.change(as_torch(part.source))
        except RuntimeError as error:  # torch's, for a tensor that cannot be taken apart so
            raise _wrong(target.name, f"cannot be made of {part.source.name} {list(part.source.shape)}") from error
        if tuple(value.shape) != target.shape:
            raise _wrong(target.name, f"comes out as {list(value.shape)}, not {list(target.shape)}")
        import torch

        return [to_bytes(value.to(getattr(torch, NAMES[target.dtype])))]

    def count(target: Stored) -> None:
        nonlocal done
        done += target.nbytes
        tell(done, total)

    tell(0, total)
    write(out, plan(targets, limit), data, count)


def expected_shapes(config: dict[str, Any], auto: str = "AutoModelForCausalLM") -> dict[str, tuple[int, ...]]:
    """Every tensor of a native model by its config, as transformers' class `auto` makes it. No memory is used."""
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    try:
        with torch.device("meta"):
            model: Any = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(**config))
    except (StrictDataclassError, ValueError, TypeError, KeyError, RuntimeError) as error:
        why = (str(error).splitlines() or ["unknown"])[-1].strip()[:300]
        raise InvalidArgument(f"config.json describes no model: {why}", reason="CONFIG_MALFORMED") from error
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def check_names(found: Iterable[str], wanted: Iterable[str], tied: bool) -> None:
    """Nothing is missing and nothing is left over. InvalidArgument (WEIGHTS_INCOMPLETE)."""
    names, needed = set(found), set(wanted)
    optional = {"lm_head.weight"} if tied else set()
    if missing := sorted(needed - names - optional):
        raise _wrong(missing[0], f"is missing, with {len(missing) - 1} others")
    if unknown := sorted(names - needed):
        raise _wrong(unknown[0], "is no tensor of such a model")


def _plan_tensors(family: Family | None, config: Mapping[str, Any], tensors: Sequence[Stored]) -> dict[str, _Made]:
    heads = heads_of(dict(config))
    made: dict[str, _Made] = {}
    for tensor in tensors:
        if is_derived(tensor.name):
            continue
        module, _, leaf = tensor.name.rpartition(".")
        for part in native_parts(family, module) if family else (Part(module),):
            name = f"{part.module}.{leaf}"
            made[name] = _Made(tensor, _change(family, name, part.rows, heads))
    return made


def _change(family: Family | None, name: str, rows: Rows | None, heads: Any) -> Callable[[Any], Any] | None:
    if family and family.unit_head and name == "lm_head.weight":
        return _unit_rows
    return None if rows is None else lambda value: rows(value, heads)


def _unit_rows(weight: Any) -> Any:
    import torch

    return torch.nn.functional.normalize(weight.float())


def _target(name: str, source: Stored, shape: tuple[int, ...]) -> Stored:
    count = 1
    for side in shape:
        count *= side
    return Stored(name, source.dtype, shape, 0, count * WIDTHS[source.dtype])


def _wrong(name: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"the tensor {name} {why}; fetch all of the model's files",
        reason="WEIGHTS_INCOMPLETE",
        metadata={"tensor": name},
    )
