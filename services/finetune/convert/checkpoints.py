"""Checkpoints of other trainers: a file of mmengine's Runner, or a directory of DeepSpeed's engine (ZeRO 1, 2, 3).

Both are pickles, read as maps (pickles.py). DeepSpeed keeps what was trained as flat float32 numbers, dealt out over its
ranks; a tensor is given as the pieces of files that hold it, so nothing is in memory before it is written.
"""

from __future__ import annotations

import ast
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from services.finetune.convert.pickles import read_pickle
from services.finetune.convert.shards import Stored
from services.finetune.errors import InvalidArgument

_STATES = re.compile(r"(?:bf16_|fp16_)?(zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")
_CONFIG_BYTES = 1 << 20
_LORA_KEYS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "modules_to_save")


@dataclass(frozen=True, slots=True)
class Trained:
    """What a checkpoint holds: trained tensors by their names in it, and the text of the config it was trained by."""

    tensors: dict[str, Stored]
    config: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a config's text says of the adapter; nothing in it is run."""

    lora: Mapping[str, Any] = field(default_factory=dict)
    template: str = ""


def read_checkpoint(folder: Path, stop: threading.Event) -> Trained:
    """The checkpoint in `folder`, at any depth; a .py file beside it is its config.

    InvalidArgument (CHECKPOINT_INCOMPLETE, CHECKPOINT_UNSUPPORTED, PICKLE_REFUSED), ResourceExhausted (OUT_OF_MEMORY),
    Cancelled (STOPPED).
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    configs = [p for p in files if p.suffix == ".py" and not p.name.startswith("zero_to_")]
    states = {p: m for p in files if (m := _STATES.fullmatch(p.name))}
    if states:
        trained = _read_zero(states, stop)
    else:
        pickles = [p for p in files if p.suffix in (".pth", ".pt", ".bin")]
        if len(pickles) != 1:
            names = ", ".join(p.name for p in pickles[:3]) or "none"
            raise _unsupported(f"a checkpoint is one .pth file or DeepSpeed's *_states.pt files; there are {names}")
        trained = _read_file(pickles[0], stop)
    if len(configs) == 1 and configs[0].stat().st_size <= _CONFIG_BYTES:
        return replace(trained, config=configs[0].read_text("utf-8", "replace"))
    return trained


def _read_file(path: Path, stop: threading.Event) -> Trained:
    data = read_pickle(path, stop)
    state = data.get("state_dict", data) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not state:
        raise _incomplete(f"{path.name} has no state_dict")
    odd = [str(k) for k, v in state.items() if not isinstance(v, Stored)]
    if odd:
        raise _unsupported(f"{path.name}: {odd[0]} is no plain tensor")
    return Trained({str(k): v.named(str(k)) for k, v in state.items()}, _config_text(data))


def _config_text(data: Mapping[str, Any]) -> str:
    meta = data.get("meta")
    text = meta.get("cfg") if isinstance(meta, dict) else None
    return text if isinstance(text, str) and len(text) <= _CONFIG_BYTES else ""


# ---------------------------------------------------------------------------------------------- DeepSpeed


def _read_zero(states: Mapping[Path, re.Match[str]], stop: threading.Event) -> Trained:
    if any(int(m[3]) for m in states.values()):
        raise _unsupported(
            "the model was split over several machines' tensors (mp_rank_01); only data parallel is read"
        )
    models = {int(m[2] or 0): read_pickle(p, stop) for p, m in states.items() if m[4] == "model"}
    optims = {int(m[2] or 0): read_pickle(p, stop) for p, m in states.items() if m[4] == "optim"}
    if 0 not in models or not isinstance(models[0], dict):
        raise _incomplete(
            "the checkpoint has no mp_rank_00_model_states.pt or zero_pp_rank_0_mp_rank_00_model_states.pt"
        )
    shapes = _param_shapes(models[0])
    config = _config_text(models[0])
    stage3 = any(m[1] and m[4] == "model" for m in states.values())
    if not optims:
        if stage3:
            raise _incomplete("the checkpoint has no *_optim_states.pt, and ZeRO 3 keeps all weights there")
        return Trained(_from_module(models[0], shapes), config)
    ranks = _ranks(optims, models[0])
    if stage3:
        return Trained(_gather3([_groups(r, "fp32_flat_groups") for r in ranks], shapes), config)
    return Trained(_gather2(ranks, shapes), config)


def _param_shapes(model: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of what was trained, by name, for each group of the optimizer."""
    given = model.get("param_shapes")
    groups = given if isinstance(given, list) else [given]
    found = []
    for group in groups:
        if not isinstance(group, dict) or not all(_is_shape(s) for s in group.values()):
            raise _incomplete("its param_shapes, which say what lies where, are missing or damaged")
        found.append({str(k): tuple(v) for k, v in group.items()})
    return found


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)


def _from_module(model: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]]) -> dict[str, Stored]:
    module = model.get("module")
    names = [name for group in shapes for name in group]
    gone = [n for n in names if not isinstance(module, dict) or not isinstance(module.get(n), Stored)]
    if gone or not isinstance(module, dict):
        raise _incomplete(
            f"the module's {gone[0] if gone else 'weights'} are missing, and there are no *_optim_states.pt"
        )
    return {name: module[name].named(name) for name in names}


def _ranks(optims: Mapping[int, Any], model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each rank's optimizer state in the order of the ranks, none missing."""
    states = {n: o.get("optimizer_state_dict") if isinstance(o, dict) else None for n, o in optims.items()}
    counts = {_count(s) for s in states.values()} | {int(model.get("dp_world_size") or len(optims))}
    if len(counts) != 1 or set(states) != set(range(next(iter(counts)))):
        raise _incomplete(f"it was written by {sorted(counts)} ranks, and has the states of ranks {sorted(states)}")
    return [s for _, s in sorted(states.items()) if isinstance(s, dict)]


def _count(state: Any) -> int:
    found = state.get("partition_count") if isinstance(state, dict) else None
    number = max(found) if isinstance(found, list) and found and all(type(n) is int for n in found) else found
    if type(number) is not int or number < 1:
        raise _incomplete("a rank's optimizer state does not say how many ranks there were")
    return number


def _groups(state: Mapping[str, Any], key: str) -> list[list[Stored]]:
    """A rank's flat float32 numbers, for each group a run of tensors."""
    given = state.get(key)
    runs = [g if isinstance(g, list) else [g] for g in given] if isinstance(given, list) else []
    if not runs or not all(isinstance(t, Stored) and t.dtype == "F32" and not t.strides for run in runs for t in run):
        raise _incomplete(f"a rank's {key} are missing or no float32 numbers")
    return runs


def _gather2(ranks: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> dict[str, Stored]:
    """ZeRO 1 and 2: a group's numbers are one line, cut into as many parts as there are ranks."""
    parts = [_groups(rank, "single_partition_of_fp32_groups") for rank in ranks]
    paddings = ranks[0].get("param_alignment_paddings")
    found: dict[str, Stored] = {}
    for n, group in enumerate(shapes):
        line = [t for rank in parts for t in (rank[n] if n < len(rank) else [])]
        gaps = paddings[n] if isinstance(paddings, list) and n < len(paddings) else [0] * len(group)
        if not isinstance(gaps, list) or len(gaps) != len(group) or not all(type(g) is int and g >= 0 for g in gaps):
            raise _incomplete("its param_alignment_paddings do not fit its param_shapes")
        at = 0
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            found[name] = _tensor(name, shape, [(line, at, _product(shape))])
            at += _product(shape) + gap
        _check_used(at, line, 2 * len(ranks))
    return found


def _gather3(
    ranks: Sequence[Sequence[Sequence[Stored]]], shapes: Sequence[Mapping[str, tuple[int, ...]]]
) -> dict[str, Stored]:
    """ZeRO 3: every tensor is cut into as many equal parts as there are ranks, the last filled up."""
    lines = [[t for group in rank for t in group] for rank in ranks]
    found: dict[str, Stored] = {}
    at = 0
    for name, shape in ((k, v) for group in shapes for k, v in group.items()):
        count = _product(shape)
        each = -(-count // len(lines))
        lengths = [max(0, min(each, count - n * each)) for n in range(len(lines))]
        found[name] = _tensor(name, shape, [(line, at, n) for line, n in zip(lines, lengths, strict=True)])
        at += each
    for line in lines:
        _check_used(at, line, 1)
    return found


def _check_used(used: int, line: Sequence[Stored], step: int) -> None:
    held = sum(t.count for t in line)
    if -(-used // step) != -(-held // step):
        raise _incomplete(f"its tensors need {used} numbers and its ranks hold {held}")


def _tensor(name: str, shape: tuple[int, ...], runs: Sequence[tuple[Sequence[Stored], int, int]]) -> Stored:
    pieces = tuple(piece for line, start, count in runs for piece in _cut(name, line, start, count))
    return Stored(name, "F32", shape, 0, 4 * _product(shape), pieces=pieces)


def _cut(name: str, line: Sequence[Stored], start: int, count: int) -> Iterator[Stored]:
    """The bytes of `count` numbers from the `start`-th of a line of flat tensors."""
    for flat in line:
        took = min(max(flat.count - start, 0), count)
        if took:
            yield replace(flat, shape=(took,), start=flat.start + 4 * start, nbytes=4 * took)
        count -= took
        start = max(start - flat.count, 0)
    if count:
        raise _incomplete(f"the ranks hold too few numbers for {name}")


def _product(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


# ---------------------------------------------------------------------------------------------- configs


def read_settings(text: str) -> Settings:
    """What XTuner's config says of the adapter and the template: only literals are read, and names that stand for them."""
    try:
        tree = ast.parse(text)
        constants = _constants(tree)
        lora = next((_literals(n, constants) for n in ast.walk(tree) if _is_lora(n)), {})
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Settings()
    template = re.search(r"PROMPT_TEMPLATE\.(\w{1,64})", text)
    return Settings(lora, template[1] if template else "")


def read_part_settings(text: str) -> dict[str, dict[str, Any]]:
    """What XTuner's LLaVA config says of the LoRA of "llm" and of "visual_encoder"; read as read_settings does."""
    try:
        tree = ast.parse(text)
        constants = _constants(tree)
        return {
            node.arg.removesuffix("_lora"): _literals(node, constants)
            for node in ast.walk(tree)
            if isinstance(node, ast.keyword)
            and node.arg in ("llm_lora", "visual_encoder_lora")
            and isinstance(node.value, ast.Call)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _constants(tree: ast.Module) -> dict[str, Any]:
    return {
        t.id: n.value.value
        for n in tree.body
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)
        for t in n.targets
        if isinstance(t, ast.Name)
    }


def _is_lora(node: ast.AST) -> bool:
    return isinstance(node, ast.keyword) and node.arg == "lora" and isinstance(node.value, ast.Call)


def _literals(node: Any, constants: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for word in node.value.keywords:
        value = word.value
        if word.arg in _LORA_KEYS and isinstance(value, ast.Name) and value.id in constants:
            found[word.arg] = constants[value.id]
        elif word.arg in _LORA_KEYS:
            found[word.arg] = ast.literal_eval(value)
    return found


def _incomplete(why: str) -> InvalidArgument:
    return InvalidArgument(f"the checkpoint is incomplete: {why}", reason="CHECKPOINT_INCOMPLETE")


def _unsupported(why: str) -> InvalidArgument:
    return InvalidArgument(f"the checkpoint cannot be used: {why}", reason="CHECKPOINT_UNSUPPORTED")
