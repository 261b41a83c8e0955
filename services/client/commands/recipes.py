"""list-cfg, copy-cfg, train."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quartet.training.v1 import training_pb2

from services.client.client import Client
from services.client.commands import connect
from services.client.commands.jobs import follow
from services.client.configs import Asked, read_config, read_deepspeed, read_options, recipe_config
from services.client.plans import GIB, check_fits, lines
from services.client.retry import pages
from services.client.show import bar, out, plain, tell
from services.client.sources import bring_base, bring_rows, local_base, local_rows
from services.finetune.config import RunConfig, from_json
from services.finetune.errors import AlreadyExists, FailedPrecondition, QuartetError, ResourceExhausted
from services.finetune.recipes.deepspeed import preset_json, presets
from services.finetune.recipes.yaml_text import write_yaml


def list_cfg(a: Namespace) -> None:
    """XTuner's frame holds XTuner's names; what is on offer beside them follows under a heading of its own."""
    with connect(a) as client:
        wanted = training_pb2.ListRecipesRequest(page_size=1000, filter='since = "seed"' if a.seed else "")
        recipes = list(pages(client.training.ListRecipes, wanted, "recipes"))
    found = {r.name.removeprefix("recipes/"): r.since for r in recipes}
    found = {name: since for name, since in found.items() if a.pattern.lower() in name.lower()}
    if a.json:
        out({"recipes": list(found)})
        return
    print("==========================CONFIGS===========================")
    if a.pattern:
        print(f"PATTERN: {a.pattern}\n-------------------------------")
    _lines([name for name, since in found.items() if since == "seed"])
    if not a.seed:
        print("====================BEYOND XTUNER 0.1.9=====================")
        _lines([name for name, since in found.items() if since != "seed"])
    print("=============================================================")


def _lines(names: Sequence[str]) -> None:
    for name in names:
        print(name)


def copy_cfg(a: Namespace) -> None:
    """The whole config of a recipe as YAML to edit; of a DeepSpeed preset, its JSON. Nothing is overwritten."""
    name = a.recipe.removeprefix("recipes/")
    if name in presets():
        text, ending = json.dumps(preset_json(name), indent=2) + "\n", "json"
    else:
        with connect(a) as client:
            text, ending = write_yaml(recipe_config(client, name), name), "yaml"
    folder = Path(a.directory)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_copy.{ending}"
    if path.exists() and path.read_bytes() != text.encode():
        raise AlreadyExists(f"{path} is there already and differs; remove it, or choose a folder", reason="FILE_EXISTS")
    path.write_text(text, "utf-8")
    out({"path": str(path)}) if a.json else print(f"Copy to {path}")


def train(a: Namespace) -> int:
    options = read_options(a.cfg_options)
    if a.seed is not None:
        options["schedule.seed"] = a.seed
    if a.save_every is not None:
        options["report.checkpoint_every"] = a.save_every
    if a.keep_last is not None:
        options["report.keep_last"] = a.keep_last
    if a.keep_best:
        options["report.keep_best"] = True
    if a.deepspeed:
        options["parallel.deepspeed"] = read_deepspeed(a.deepspeed)
    with connect(a) as client:
        asked = read_config(client, a.config, options)
        for note in asked.notes:
            _say(f"{a.config}: {note}")
        if a.dry_run:
            return _plan(client, a, asked)
        base, data = _sources(client, a, asked)
        job = client.train(asked.recipe, base, data, asked.overrides, job_id=a.name, **_beside(client, a))
        work_dir = a.work_dir or asked.work_dir
        if work_dir:
            _write_work_dir(Path(work_dir), asked.name, job)
        if a.detach:
            out(plain(job)) if a.json else print(f"{job.name}\ncome back with: quartet job watch {job.name}")
            return 0
        status = follow(client, job.name, a.json)
        if work_dir and (last := client.job(job.name).result):
            (Path(work_dir) / "last_checkpoint").write_text(last, "utf-8")
        return status


def _beside(client: Client, a: Namespace) -> dict[str, Any]:
    """What a job names beside its base, data and config."""
    return {"resume_from": a.resume, "validation_datasets": [client.revision(d) for d in a.validation]}


def _plan(client: Client, a: Namespace, asked: Asked) -> int:
    """What the run would take; nothing is brought or made. 73 if it does not fit."""
    if (not a.data and local_rows(asked.config)) or (not a.base and local_base(asked.config)):
        raise FailedPrecondition(
            "--dry-run brings nothing, and the config names files of this machine: give --base and --data",
            reason="NOT_BROUGHT",
        )
    memory = int((a.gpu_memory_gib or 0) * GIB)
    device = training_pb2.PlanDevice(kind=a.gpu, memory=memory) if a.gpu or memory else None
    more = {**_beside(client, a), "job_id": a.name, "validate_only": True, "device": device}
    job = client.train(asked.recipe, a.base, a.data, asked.overrides, **more)
    if a.json:
        out(plain(job))
    else:
        print("\n".join(lines(job)))
    try:
        check_fits(job)
    except ResourceExhausted as error:
        return tell(error, as_json=False)
    return 0


def _sources(client: Client, a: Namespace, asked: Asked) -> tuple[str, list[str]]:
    """The base model and the datasets: those given, else what the config names here, brought to the services."""
    rows = [] if a.data else local_rows(asked.config)
    folder = None if a.base else local_base(asked.config)
    if rows or folder:
        _check(client, a, asked, (["DATASET_MISSING"] if rows else []) + (["MODEL_NOT_FOUND"] if folder else []))
    with bar("uploading", a.json) as told:
        base = bring_base(client, folder, _say, told) if folder else a.base
        return base, a.data or [bring_rows(client, one, _say, told) for one in rows]


def _check(client: Client, a: Namespace, asked: Asked, expected: Sequence[str]) -> None:
    """Before gigabytes are moved: whatever else than what is still to come would be refused."""
    try:
        client.train(asked.recipe, a.base, a.data, asked.overrides, validate_only=True, **_beside(client, a))
    except QuartetError as error:
        if error.reason not in expected:
            raise


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write_work_dir(folder: Path, name: str, job: training_pb2.TrainingJob) -> None:
    """The config as it runs and the job's name; the checkpoint's name follows at the end, in a file as mmengine's."""
    folder.mkdir(parents=True, exist_ok=True)
    config = from_json(RunConfig, plain(job)["config"])
    (folder / f"{name}.yaml").write_text(write_yaml(config, name), "utf-8")
    (folder / "job").write_text(job.name, "utf-8")
