"""What the training room decides: which order a job becomes, and what its events and results mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from services.common import names
from services.common.jobs import Jobs
from services.common.launchers import Shape
from services.common.paging import page
from services.common.records import Record
from services.common.supervisor import Work
from services.finetune import recipes
from services.finetune.config import RunConfig, override, to_json
from services.finetune.devices import Device
from services.finetune.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Unimplemented, Violation
from services.finetune.orders import ArtifactRef, TrainRun
from services.finetune.prepare import check_weights
from services.finetune.progress import Event, retained
from services.finetune.recipes.deepspeed import lacks as zero_lacks
from services.finetune.store import Store
from services.finetune.store.artifacts import (
    File,
    Manifest,
    Ref,
    delete_ref,
    get_ref,
    list_refs,
    load,
    put_ref,
    stream_file,
)
from services.finetune.templates import check_name
from services.training.planning import Planner, to_message

JOB = "workspaces/{workspace}/trainingJobs/{job}"
CHECKPOINT = JOB + "/checkpoints/{step}"
MODEL = "workspaces/{workspace}/models/{model}"
REVISION = "workspaces/{workspace}/datasets/{dataset}/revisions/{revision}"


REPORT = "report"
"""The last part of the name under which a job's newest report is kept."""
BITS = {"full": 0, "lora": 0, "qlora": 4, "int8_lora": 8}


class Training:
    """Recipes, jobs and checkpoints. `jobs` is set by the wiring, which needs `work` first."""

    jobs: Jobs

    def __init__(self, store: Store, planner: Planner) -> None:
        self._store = store
        self._planner = planner
        self.work = Work("trainingJob", "train", self.order, self._succeed, self._notice, shape=shape)

    # ------------------------------------------------------------------------------------------ recipes

    def recipe(self, name: str) -> recipes.Recipe:
        names.parse("recipes/{recipe}", name)
        return recipes.resolve(name.removeprefix("recipes/"))

    def list_recipes(self, **paging: Any) -> tuple[list[recipes.Recipe], str]:
        found = [recipes.resolve(name) for name in recipes.names()]

        def fields(r: recipes.Recipe) -> Mapping[str, Any]:
            return {"name": r.name, "model": r.model, "method": r.method, "dataset": r.dataset, "since": r.since}

        return page(found, fields=fields, orders=["name"], default_order="name", **paging)

    # ------------------------------------------------------------------------------------------ jobs

    def create(
        self,
        parent: str,
        job_id: str,
        spec: dict[str, Any],
        request: tuple[str, str],
        dry: bool,
        device: Device | None = None,
    ) -> Record:
        """Resolve everything that the job names, then queue it, or if `dry` plan it. `request` is (request_id,
        fingerprint); `device` is where a plan is to be for."""
        names.parse("workspaces/{workspace}", parent, "parent")
        made = self.jobs.records.requested(self.work.kind, *request)
        if made is not None:
            return made
        name = f"{parent}/trainingJobs/{names.choose_id(job_id, request[0], 'job')}"
        config = self._config(spec)
        base = self._model(spec["base_model"] or self._imported(parent, config.model.checkpoint))
        if config.data.template in ("", "tokenizer") and not load(self._store, base.digest).meta["template"]:
            raise FailedPrecondition(
                f"{base.name} has no chat template; name one by data.template", reason="TEMPLATE_MISSING"
            )
        datasets = [self._revision(d) for d in spec["datasets"]]
        if not datasets:
            raise InvalidArgument(
                "a job needs a dataset revision to learn from",
                reason="DATASET_MISSING",
                violations=[Violation("training_job.datasets", "is empty", "DATASET_MISSING")],
            )
        check_weights(config.data.weights, len(datasets))
        looked = [self._revision(d, "training_job.validation_datasets") for d in spec["validation_datasets"]]
        _validated(config, bool(looked))
        resume = self._checkpoint(spec["resume_from"]) if spec["resume_from"] else None
        run = TrainRun(
            job=name, config=config, base=base, datasets=tuple(datasets), resume=resume, validation=tuple(looked)
        )
        spec = {**spec, "run": to_json(run), "base_model": base.name, "datasets": [d.name for d in datasets]}
        spec["validation_datasets"] = [d.name for d in looked]
        if dry:
            planned = self._planner.plan(run, device, self.jobs.records.find(self.work.kind, parent + "/"))
            return Record(name, self.work.kind, "QUEUED", {"spec": spec, "attempt": 0, "plan": to_message(planned)})

        def again() -> Any:
            now = [self._revision(d.name) for d in datasets]
            seen = [self._revision(d.name, "training_job.validation_datasets") for d in looked]
            last = self._checkpoint(resume.name) if resume else None
            new = replace(run, base=self._model(base.name), datasets=tuple(now), validation=tuple(seen), resume=last)
            return to_json(new)

        return self.jobs.create(name, spec, *request, again=again)

    def delete(self, name: str, etag: str) -> None:
        def forget() -> None:
            for ref in list(list_refs(self._store, f"{name}/checkpoints/")):
                delete_ref(self._store, ref.name)
            delete_ref(self._store, f"{name}/{REPORT}")

        self.jobs.delete(name, etag, forget)

    def checkpoints(self, parent: str, **paging: Any) -> tuple[Sequence[Ref], str]:
        self.jobs.get(parent)

        def fields(r: Ref) -> Mapping[str, Any]:
            return {"name": r.name, "step": r.body["step"]}

        found = list(list_refs(self._store, f"{parent}/checkpoints/"))
        return page(found, fields=fields, orders=["step"], default_order="step", **paging)

    def files(self, parent: str, page_size: int, page_token: str) -> tuple[Sequence[File], str]:
        """What a job left beside its checkpoints, by path."""
        report = self._report(parent)
        found = report.files if report else ()
        return page(
            found,
            fields=lambda file: {"name": file.path},
            orders=["name"],
            default_order="name",
            page_size=page_size,
            page_token=page_token,
            filter="",
            order_by="",
        )

    def download(self, name: str, path: str, offset: int, digest: str) -> Iterator[bytes]:
        """One file's bytes from `offset` on. NotFound (FILE_NOT_FOUND), Aborted (FILE_CHANGED), and as stream_file."""
        report = self._report(name)
        if report is None:
            raise NotFound(f"{name} has no files yet", reason="FILE_NOT_FOUND", metadata={"path": path})
        file = report.file(path)
        if digest not in ("", file.digest):
            raise Aborted(f"{path} was replaced meanwhile; list the files again", reason="FILE_CHANGED")
        return stream_file(self._store, file, offset)

    def _report(self, name: str) -> Manifest | None:
        self.jobs.get(name)
        ref = get_ref(self._store, f"{name}/{REPORT}")
        return load(self._store, ref.body["digest"]) if ref else None

    # ------------------------------------------------------------------------------------------ for the supervisor

    def order(self, job: Record) -> Mapping[str, Any]:
        run: Mapping[str, Any] = job.body["spec"]["run"]
        return run

    def _notice(self, job: Record, event: Event) -> Event | None:
        """A checkpoint gets its name before anybody hears of it; a report is the job's newest."""
        if event["type"] == "report":
            self._put_report(job, event["digest"])
            return None
        if event["type"] != "checkpoint":
            return event
        name = f"{job.name}/checkpoints/{event['step']}"
        body: dict[str, Any] = {k: event[k] for k in ("digest", "step", "loss", "validation_loss") if k in event}
        # A later attempt may come to the same step again; what it saved is what it will go on from.
        put_ref(self._store, name, {**body, "create_time": names.now(), "job": job.name})
        if "report" in event:
            self._put_report(job, event["report"])
        self._let_go(job)
        return {**event, "name": name}

    def _put_report(self, job: Record, digest: str) -> None:
        put_ref(self._store, f"{job.name}/{REPORT}", {"digest": digest, "job": job.name})

    def _let_go(self, job: Record) -> None:
        """Forget the names of checkpoints that the job's config does not keep; those that another job begins from stay."""
        report = job.body["spec"]["run"]["config"]["report"]
        if not report.get("keep_last", 0):
            return
        found = {ref.body["step"]: ref for ref in list_refs(self._store, f"{job.name}/checkpoints/")}
        kept = retained([ref.body for ref in found.values()], report["keep_last"], report["keep_best"])
        gone = [ref.name for step, ref in found.items() if step not in kept]
        if gone:
            named = {other.body["spec"]["resume_from"] for other in self.jobs.records.find(self.work.kind)}
            for name in gone:
                if name not in named:
                    delete_ref(self._store, name)

    def _succeed(self, job: Record, result: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"result": f"{job.name}/checkpoints/{result['step']}"}

    # ------------------------------------------------------------------------------------------ names to digests

    def _config(self, spec: Mapping[str, Any]) -> RunConfig:
        name = spec["recipe"].removeprefix("recipes/")
        config = self._recipe_config(name) if name else RunConfig()
        overrides = dict(spec["overrides"])
        if overrides.get("method") in BITS:
            overrides.setdefault("quant.bits", BITS[overrides["method"]])
        config = override(config, overrides)
        if config.quant.bits != BITS[config.method]:
            raise InvalidArgument(
                f"the method {config.method} needs quant.bits {BITS[config.method]}", reason="CONFIG_VALUE_INVALID"
            )
        if config.data.template:
            check_name(config.data.template)
        _positive(config)
        _supported(config)
        return config

    def _recipe_config(self, name: str) -> RunConfig:
        recipe = self.recipe("recipes/" + name)
        if not recipe.model:
            raise InvalidArgument(
                f"{name} is a DeepSpeed preset: train a recipe with parallel.deepspeed set to it",
                reason="RECIPE_NOT_TRAINABLE",
                metadata={"recipe": name},
            )
        return recipe.config

    def _imported(self, parent: str, checkpoint: str) -> str:
        """The newest model of a workspace that came from a hub id."""
        if not checkpoint:
            raise InvalidArgument("a job needs a base_model, or a config with model.checkpoint", reason="MODEL_MISSING")
        found = [r for r in list_refs(self._store, f"{parent}/models/") if r.body.get("source") == checkpoint]
        if not found:
            raise NotFound(
                f"no model of {parent} was imported from {checkpoint}; run: quartet model import {checkpoint}",
                reason="MODEL_NOT_FOUND",
                metadata={"checkpoint": checkpoint},
            )
        return max(found, key=lambda r: str(r.body["create_time"])).name

    def _model(self, name: str) -> ArtifactRef:
        names.parse(MODEL, name, "training_job.base_model")
        ref = get_ref(self._store, name)
        if ref is None:
            raise NotFound(
                f"there is no model {name}; import it first", reason="MODEL_NOT_FOUND", metadata={"name": name}
            )
        if ref.body["kind"] == "adapter":
            raise FailedPrecondition(
                f"{name} is an adapter; tune a base model, or merge it first", reason="MODEL_NOT_TRAINABLE"
            )
        if ref.body["kind"] == "vision_tower":
            raise FailedPrecondition(
                f"{name} is a vision tower; tune a LLaVA model that it is in (CreateConversionJob with assemble)",
                reason="MODEL_NOT_TRAINABLE",
            )
        if ref.body["kind"] == "encoder":
            raise FailedPrecondition(
                f"{name} is an encoder, which answers nothing; tune a language model", reason="MODEL_NOT_TRAINABLE"
            )
        if ref.body["kind"] in ("quantized", "exported"):
            raise FailedPrecondition(
                f"{name} is of kind {ref.body['kind'].upper()}; tune the model that it was made from, with the method qlora "
                "if memory is short",
                reason="MODEL_NOT_TRAINABLE",
            )
        return ArtifactRef(name=name, digest=ref.body["digest"])

    def _revision(self, name: str, field: str = "training_job.datasets") -> ArtifactRef:
        names.parse(REVISION, name, field)
        if name.endswith("/revisions/latest"):
            dataset = get_ref(self._store, name.removesuffix("/revisions/latest"))
            name = dataset.body["latest_revision"] or name if dataset else name
        ref = get_ref(self._store, name)
        if ref is None:
            raise NotFound(f"there is no dataset revision {name}", reason="REVISION_NOT_FOUND", metadata={"name": name})
        return ArtifactRef(name=name, digest=ref.body["digest"])

    def _checkpoint(self, name: str) -> ArtifactRef:
        names.parse(CHECKPOINT, name, "training_job.resume_from")
        ref = get_ref(self._store, name)
        if ref is None:
            raise NotFound(f"there is no checkpoint {name}", reason="CHECKPOINT_NOT_FOUND", metadata={"name": name})
        return ArtifactRef(name=name, digest=ref.body["digest"])


def shape(job: Record) -> Shape:
    """The machines and GPUs that a job's config asks for."""
    parallel = job.body["spec"]["run"]["config"]["parallel"]
    return Shape(parallel.get("nodes", 1), parallel.get("processes", 0))


def _positive(config: RunConfig) -> None:
    """Values that would make a run senseless are refused before anything is started."""
    least = {
        "model.gradient_checkpointing_every": (config.model.gradient_checkpointing_every, 1),
        "lora.rank": (config.lora.rank, 1),
        **{f"lora.rank_pattern.{p}": (rank, 1) for p, rank in config.lora.rank_pattern.items()},
        "data.max_length": (config.data.max_length, 8),
        "data.max_rows": (config.data.max_rows, 0),
        "schedule.epochs": (config.schedule.epochs, 1),
        "schedule.max_steps": (config.schedule.max_steps, 0),
        "schedule.batch_size": (config.schedule.batch_size, 1),
        "schedule.accumulate": (config.schedule.accumulate, 1),
        "schedule.ranks": (config.schedule.ranks, 1),
        "schedule.seed": (config.schedule.seed, 0),
        "schedule.warmup_steps": (config.schedule.warmup_steps, 0),
        "report.log_every": (config.report.log_every, 1),
        "report.checkpoint_every": (config.report.checkpoint_every, 1),
        "report.checkpoint_epochs": (config.report.checkpoint_epochs, 0),
        "report.sample_every": (config.report.sample_every, 0),
        "report.keep_last": (config.report.keep_last, 0),
        "validation.ratio": (config.validation.ratio, 0),
        "validation.every": (config.validation.every, 0),
        "validation.patience": (config.validation.patience, 0),
        "validation.min_delta": (config.validation.min_delta, 0),
        "parallel.processes": (config.parallel.processes, 0),
        "parallel.nodes": (config.parallel.nodes, 1),
        "schedule.min_lr_ratio": (config.schedule.min_lr_ratio, 0),
        "schedule.decay_ratio": (config.schedule.decay_ratio, 0),
        "optim.lr": (config.optim.lr, 0),
        "optim.weight_decay": (config.optim.weight_decay, 0),
    }
    for key, (value, lowest) in least.items():
        _must(value >= lowest, key, f"be at least {lowest}", value)
    for key, value in {
        "lora.dropout": config.lora.dropout,
        "optim.beta1": config.optim.beta1,
        "optim.beta2": config.optim.beta2,
        "optim.momentum": config.optim.momentum,
        "validation.ratio": config.validation.ratio,
    }.items():
        _must(0 <= value < 1, key, "be 0 or more and below 1", value)
    ratio, power = config.lora.loraplus_lr_ratio, config.schedule.power
    _must(ratio > 0, "lora.loraplus_lr_ratio", "be above 0", ratio)
    _must(power > 0, "schedule.power", "be above 0", power)
    for pattern, lr in config.optim.lr_pattern.items():
        _must(lr >= 0, f"optim.lr_pattern.{pattern}", "be at least 0", lr)
    images, prompts = config.report.images, config.report.prompts
    _must(len(images) in (0, 1, len(prompts)), "report.images", "be one path, or one for each prompt", list(images))
    frozen = config.model.freeze
    _must(config.method == "full" or not frozen, "model.freeze", "be empty unless the method is full", list(frozen))


def _must(true: bool, key: str, what: str, value: object) -> None:
    if not true:
        raise InvalidArgument(
            f"config key {key!r} must {what}, not {value}", reason="CONFIG_VALUE_INVALID", metadata={"key": key}
        )


def _validated(config: RunConfig, datasets: bool) -> None:
    """A job that is to end by its validation loss has one."""
    if config.validation.patience and not (config.validation.ratio or datasets):
        raise InvalidArgument(
            "validation.patience needs rows to look at: set validation.ratio, or name validation_datasets",
            reason="CONFIG_VALUE_INVALID",
            metadata={"key": "validation.patience"},
        )


def _supported(config: RunConfig) -> None:
    """Unimplemented (TRAINER_LACKS) for what the trainer does not act on yet: nothing that is asked for is left out."""
    lacks = {
        "report.measures": (config.report.measures, ((),), "set it to []"),
    }
    violations = [
        Violation(key, f"{value!r} is not supported by the trainer yet; {instead}", "TRAINER_LACKS")
        for key, (value, known, instead) in lacks.items()
        if value not in known
    ]
    if preset := config.parallel.deepspeed:
        violations += [
            Violation(key, f"{value!r} is not supported with {preset}; {instead}", "TRAINER_LACKS")
            for key, (value, instead) in zero_lacks(config).items()
        ]
    if violations:
        told = "; ".join(f"{v.field} {v.message}" for v in violations)
        raise Unimplemented(told, reason="TRAINER_LACKS", violations=violations)
