"""A RunConfig as YAML that people edit: written whole and with comments, read strictly, every error with its line.

YAML 1.2's core: `1e-3` is a number, `yes` and `no` are texts. No tags, no anchors, no key twice: it is data and no more.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from typing import Any, get_args

import yaml

from services.finetune.config import DataSource, Optimizer, RunConfig, Schedule, from_json, to_json
from services.finetune.errors import InvalidArgument

MAX_TEXT_BYTES = 1 << 20
_TAG = "tag:yaml.org,2002:"
_PATTERNS = {
    "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
}

_ABOUT = {
    "model": "The base: a hub's id, or a folder on the machine where `quartet train` runs. dtype: auto, bfloat16, float16, "
    "float32. freeze: modules that the method full leaves alone. gradient_checkpointing: auto, none, full, or selective: "
    "every gradient_checkpointing_every-th layer.",
    "vision": "Of a model that sees: model.checkpoint is assembled with the tower, a hub's id or a folder, and a pretrained "
    "projector, if there is one. Its modules are language_model, vision_tower, multi_modal_projector.",
    "lora": "Unused by the method full. targets: linear layers, or all-linear; modules_to_save: trained whole. Both by last "
    "name, or by whole name with * in it, as rank_pattern and alpha_pattern: {'model.layers.0.*': 8}.",
    "quant": "How the frozen base is stored. bits: 4 for qlora, 8 for int8_lora, else 0. kind: nf4 or fp4.",
    "data": "template: a prompt template's name, tokenizer for the model's own. sources: where the rows come from, unless "
    "`quartet train --data` names datasets; each has files, or hub_id, hub, subset and folder; split and format; images is "
    "the folder in which rows name images.",
    "optim": f"name: {', '.join(get_args(Optimizer))}. clip_norm: largest norm of the gradient; 0 does not clip. "
    "lr_pattern: another rate for modules: {multi_modal_projector: 0.001}.",
    "schedule": "One optimizer step reads batch_size * accumulate * ranks blocks, however many processes run. The rate "
    f"climbs for warmup_ratio of all steps, or warmup_steps, then falls to min_lr_ratio by kind: "
    f"{', '.join(get_args(Schedule))}. power is polynomial's, decay_ratio the part of all steps in which wsd falls. "
    "deterministic: on a GPU, slower and bit-identical.",
    "report": "Intervals are optimizer steps. prompts are asked every sample_every steps and at the end, about images: "
    "files of the data. keep_last: how many checkpoints stay, 0 for all; keep_best: the best stays too and is the result. "
    "trackers: wandb, mlflow.",
    "validation": "ratio: part of the rows that is held out. every: optimizer steps between looks, 0 for epochs. patience: "
    "end after so many looks without a loss that is lower by min_delta, 0 for never.",
    "parallel": "deepspeed: a preset's name, or empty for the cheapest way that fits. processes: on each machine, 0 for one "
    "a GPU.",
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML declares it as a plain dict


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML declares it as a plain dict


for _name, (_pattern, _first) in _PATTERNS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^{_pattern}$"), _first)


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None
    if re.search("[\x85\u2028\u2029]", text):
        style = '"'  # PyYAML folds rare line ends into spaces in every other style
    elif "\n" in text and not text.startswith((" ", "\n")):
        style = "|"
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent)


def read_yaml(text: str, file: str) -> RunConfig:
    """The config of a YAML text; keys left out have their defaults.

    InvalidArgument: CONFIG_SYNTAX; CONFIG_KEY_UNKNOWN naming the nearest; CONFIG_VALUE_INVALID. All name file and line.
    """
    lines: dict[str, int] = {}
    data = _parse(text, file, lines)
    try:
        return from_json(RunConfig, {} if data is None else data)
    except InvalidArgument as error:
        line = lines.get(error.metadata.get("key", ""), 1)
        metadata = {**error.metadata, "file": file, "line": str(line)}
        raise InvalidArgument(f"{file}:{line}: {error.message}", reason=error.reason, metadata=metadata) from error


def write_yaml(config: RunConfig, name: str) -> str:
    """The whole config with a comment on each section; of a source only what it has."""
    data = to_json(config)
    plain = to_json(DataSource())
    data["data"]["sources"] = [{k: v for k, v in s.items() if v != plain[k]} for s in data["data"]["sources"]]
    made = [f"# {name}: edit, then `quartet train` this file.\n", _dump({"method": data["method"]})]
    for f in dataclasses.fields(config):
        if f.name in _ABOUT:
            about = textwrap.fill(_ABOUT[f.name], 118, initial_indent="# ", subsequent_indent="# ")
            made.append(f"\n{about}\n{_dump({f.name: data[f.name]})}")
    return "".join(made)


def _dump(data: Any) -> str:
    # Not only printable text may stand in a prompt: PyYAML escapes what YAML cannot hold.
    return str(yaml.dump(data, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=118))


def _parse(text: str, file: str, lines: dict[str, int]) -> Any:
    """Plain data; `lines` gets the line of each dotted key."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
        raise InvalidArgument(f"{file}: a config of more than 1 MiB", reason="CONFIG_SYNTAX")
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise _broken(file, event.start_mark, "anchors and aliases are not read")
        root = yaml.compose(text, Loader=_Loader)
        return None if root is None else _plain(root, "", file, lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise _broken(file, mark, f"not YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise InvalidArgument(f"{file}: nested too deeply", reason="CONFIG_SYNTAX") from error


def _plain(node: yaml.Node, path: str, file: str, lines: dict[str, int]) -> Any:
    lines[path] = node.start_mark.line + 1
    tag = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and tag == "map":
        return _mapping(node, path, file, lines)
    if isinstance(node, yaml.SequenceNode) and tag == "seq":
        return [_plain(item, f"{path}[{n}]", file, lines) for n, item in enumerate(node.value)]
    if not isinstance(node, yaml.ScalarNode) or tag not in ("str", *_PATTERNS):
        raise _broken(file, node.start_mark, f"the tag {node.tag} is not read")
    if tag in ("int", "float"):
        # A tag may stand before any text.
        if re.fullmatch(_PATTERNS[tag][0], node.value) is None or len(node.value) > 100:
            raise _broken(file, node.start_mark, f"{node.value[:40]!r} is no number")
        return int(node.value) if tag == "int" else float(node.value)
    return {"null": None, "bool": node.value.lower() == "true"}.get(tag, node.value)


def _mapping(node: yaml.MappingNode, path: str, file: str, lines: dict[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.value:
        name = str(key.value)
        if not isinstance(key, yaml.ScalarNode) or name in found:
            raise _broken(file, key.start_mark, f"the key {name[:40]!r} stands twice, or is no text")
        inner = f"{path}.{name}" if path else name
        found[name] = _plain(value, inner, file, lines)
        lines[inner] = key.start_mark.line + 1
    return found


def _broken(file: str, mark: Any, why: str) -> InvalidArgument:
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
    return InvalidArgument(
        f"{file}:{line}:{column}: {why}",
        reason="CONFIG_SYNTAX",
        metadata={"file": file, "line": str(line), "column": str(column)},
    )
