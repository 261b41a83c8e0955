"""What `quartet train` is given: a recipe's name, our YAML, or XTuner's Python text, with options laid over it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from quartet.training.v1 import training_pb2

from services.client.client import Client
from services.finetune.config import RunConfig, from_json, keys, override, to_json
from services.finetune.errors import InvalidArgument, NotFound
from services.finetune.recipes.deepspeed import preset_of, presets
from services.finetune.recipes.options import is_ours, translate
from services.finetune.recipes.xtuner import read_xtuner
from services.finetune.recipes.yaml_text import read_yaml

ENDINGS = (".py", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Asked:
    """A run as it was asked for. `overrides` make `config` of `recipe`, or of the defaults if that is empty."""

    name: str
    recipe: str
    overrides: Mapping[str, Any]
    config: RunConfig
    notes: tuple[str, ...] = ()
    """What is done in another way than the text says, with lines."""
    work_dir: str = ""


def read_config(client: Client, argument: str, options: Mapping[str, Any]) -> Asked:
    """`options` are --cfg-options: our keys, or XTuner's.

    NotFound (FILE_NOT_FOUND, RECIPE_UNKNOWN), InvalidArgument (CONFIG_SYNTAX, CONFIG_UNSUPPORTED, CONFIG_KEY_UNKNOWN,
    CONFIG_VALUE_INVALID).
    """
    if not argument.endswith(ENDINGS):
        config = recipe_config(client, argument)
        changes = translate(config, options)
        return Asked(argument.removeprefix("recipes/"), argument, changes, override(config, changes))
    path = Path(argument).expanduser()
    text = _text(path, argument)
    if path.suffix == ".py":
        theirs = {key: value for key, value in options.items() if not is_ours(key)}
        ours = {key: value for key, value in options.items() if is_ours(key)}
        read = read_xtuner(text, argument, theirs, lambda name: _text(path.parent / name, name))
        config = override(read.config, ours)
        return Asked(path.stem, "", flat(config), config, read.notes, read.work_dir)
    config = read_yaml(text, argument)
    config = override(config, translate(config, options))
    return Asked(path.stem, "", flat(config), config)


def recipe_config(client: Client, name: str) -> RunConfig:
    """The config that the service resolves a name to. NotFound (RECIPE_UNKNOWN)."""
    request = training_pb2.GetRecipeRequest(name="recipes/" + name.removeprefix("recipes/"))
    return from_json(RunConfig, json_format.MessageToDict(client.training.GetRecipe(request).config))


def flat(config: RunConfig) -> dict[str, Any]:
    """Every value by its dotted key."""
    data = to_json(config)
    found = {}
    for key in keys(config):
        section, _, last = key.rpartition(".")
        found[key] = data[section][last] if section else data[last]
    return found


def read_deepspeed(argument: str) -> str:
    """The preset that a name or a JSON file means. NotFound (FILE_NOT_FOUND), InvalidArgument (DEEPSPEED_UNSUPPORTED)."""
    if argument in presets():
        return argument
    if not argument.endswith(".json"):
        raise InvalidArgument(
            f"--deepspeed: {argument} is no preset and no .json file; presets are {', '.join(presets())}",
            reason="DEEPSPEED_UNKNOWN",
        )
    try:
        return preset_of(json.loads(_text(Path(argument).expanduser(), argument)), argument)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{argument}: not JSON: {error}", reason="DEEPSPEED_UNSUPPORTED") from error


def read_options(pairs: Sequence[str]) -> dict[str, Any]:
    """--cfg-options: values are JSON where they can be read as that, else texts. InvalidArgument (CONFIG_KEY_UNKNOWN)."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InvalidArgument(f"--cfg-options: {pair!r} is not KEY=VALUE", reason="CONFIG_KEY_UNKNOWN")
        try:
            # JSON as its standard says: NaN and Infinity are texts, and the service refuses them by key.
            found[key] = json.loads(value, parse_constant=str)
        except ValueError:
            found[key] = {"True": True, "False": False}.get(value, value)
    return found


def _text(path: Path, name: str) -> str:
    if not path.is_file():
        raise NotFound(f"{name} is no file", reason="FILE_NOT_FOUND")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{name} is not UTF-8: {error}", reason="CONFIG_SYNTAX") from error
