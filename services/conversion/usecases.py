"""What the conversion room decides: which order a job becomes, and the registry of models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from services.common import names
from services.common.jobs import Jobs
from services.common.paging import page
from services.common.records import Record
from services.common.supervisor import Work
from services.conversion import outgoing
from services.conversion.registry import Lineage, Registry
from services.finetune.config import to_json
from services.finetune.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Violation,
)
from services.finetune.orders import AdapterTask, ArtifactRef, AssembleTask, ConvertRun, ImportTask, MergeTask
from services.finetune.progress import Event
from services.finetune.store import Store, garbage
from services.finetune.store.artifacts import (
    Manifest,
    Ref,
    delete_ref,
    get_ref,
    list_refs,
    load,
    put_ref,
    stream_file,
)
from services.finetune.store.checks import blob_name
from services.finetune.store.holds import list_holds
from services.finetune.templates import check_name

JOB = "workspaces/{workspace}/conversionJobs/{job}"
MODEL = "workspaces/{workspace}/models/{model}"
CHECKPOINT = "workspaces/{workspace}/trainingJobs/{job}/checkpoints/{step}"
REVISION = "workspaces/{workspace}/datasets/{dataset}/revisions/{revision}"
ENDPOINT = "workspaces/{workspace}/endpoints/{endpoint}"
STARTS = {
    "/revisions/": (REVISION, "REVISION_NOT_FOUND"),
    "/checkpoints/": (CHECKPOINT, "CHECKPOINT_NOT_FOUND"),
}
"""What a lineage may begin with besides models."""
DTYPES = ("", "float32", "bfloat16", "float16")
DIRECT_FROM_BYTES = 8 << 20
LINK_VALID_S = 3600


@dataclass(frozen=True, slots=True)
class Model:
    """A registered model: its name, and the artifact behind it."""

    ref: Ref
    manifest: Manifest


class Conversion:
    """Conversion jobs and models. `jobs` is set by the wiring, which needs `work` first."""

    jobs: Jobs

    def __init__(
        self, store: Store, import_roots: Sequence[Path], export_prefixes: Sequence[str] = (), direct: bool = True
    ) -> None:
        self._store = store
        self._direct = direct
        self._export_prefixes = export_prefixes
        self._roots = [root.resolve() for root in import_roots]
        self.work = Work("conversionJob", "convert", self.order, self._succeed, _notice)
        # A digest names one manifest for ever, so it may be kept.
        self._manifest = lru_cache(maxsize=4096)(lambda digest: load(store, digest))
        self._registry = Registry(store, self._manifest)

    # ------------------------------------------------------------------------------------------ jobs

    def create(self, parent: str, job_id: str, spec: dict[str, Any], request: tuple[str, str], dry: bool) -> Record:
        """Resolve everything that the job names, then queue it. `request` is (request_id, fingerprint)."""
        names.parse("workspaces/{workspace}", parent, "parent")
        made = self.jobs.records.requested(self.work.kind, *request)
        if made is not None:
            return made
        name = f"{parent}/conversionJobs/{names.choose_id(job_id, request[0], 'conversion')}"
        target = spec["target_model"]
        names.parse(MODEL, target, "conversion_job.target_model")
        if get_ref(self._store, target) is not None:
            raise AlreadyExists(
                f"{target} exists already; choose another name, or delete it first",
                reason="MODEL_EXISTS",
                metadata={"name": target},
            )

        def order() -> Any:
            return to_json(ConvertRun(job=name, **self._task(task, arguments)))

        task, arguments = spec["task"], spec["arguments"]
        spec = {**spec, "run": order()}
        if dry:
            return Record(name, self.work.kind, "QUEUED", {"spec": spec, "attempt": 0})
        return self.jobs.create(name, spec, *request, again=order)

    def order(self, job: Record) -> Mapping[str, Any]:
        run: Mapping[str, Any] = job.body["spec"]["run"]
        return run

    def _succeed(self, job: Record, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """Bind the target's name. Done twice it finds its own work; another's under that name is refused."""
        spec = job.body["spec"]
        digest = result["model"]
        body = {
            "digest": digest,
            "kind": self._manifest(digest).kind,
            "display_name": spec["display_name"],
            "labels": spec["labels"],
            "create_time": names.now(),
            "job": job.name,
            # Only imports have one.
            "source": spec["arguments"].get("hub_id", ""),
        }
        try:
            put_ref(self._store, spec["target_model"], body, if_absent=True)
        except Aborted:
            found = get_ref(self._store, spec["target_model"])
            if found is None or (found.body.get("job"), found.body["digest"]) != (job.name, digest):
                raise AlreadyExists(
                    f"{spec['target_model']} was taken meanwhile; convert again under another name",
                    reason="MODEL_EXISTS",
                    metadata={"name": spec["target_model"], "digest": digest},
                ) from None
        return {"digest": digest}

    # ------------------------------------------------------------------------------------------ models

    def get_model(self, name: str) -> Model:
        names.parse(MODEL, name)
        ref = get_ref(self._store, name)
        if ref is None:
            raise NotFound(f"there is no model {name}", reason="MODEL_NOT_FOUND", metadata={"name": name})
        return Model(ref, self._manifest(ref.body["digest"]))

    def list_models(self, parent: str, **paging: Any) -> tuple[Sequence[Model], str]:
        names.parse("workspaces/{workspace}", parent, "parent")

        models = [Model(r, self._manifest(r.body["digest"])) for r in list_refs(self._store, f"{parent}/models/")]
        orders = ["name", "create_time", "size_bytes", "parameter_count"]
        return page(models, fields=_fields, orders=orders, default_order="name", **paging)

    def delete_model(self, name: str, etag: str, force: bool) -> None:
        """Forget a model; FailedPrecondition (MODEL_IN_USE) if something needs it, unless `force`."""
        model = self.get_model(name)
        if etag and etag != model.ref.etag:
            raise Aborted(f"{name} changed meanwhile; read it again", reason="ETAG_MISMATCH")
        self._check_unused(model, force)
        try:
            delete_ref(self._store, name, if_match=model.ref.etag)
        except Aborted as error:
            raise Aborted(f"{name} changed meanwhile; read it again", reason="ETAG_MISMATCH") from error
        try:
            # Who held it since the look above may have found the name still there.
            self._check_unused(model, force)
        except FailedPrecondition:
            with contextlib.suppress(Aborted):
                put_ref(self._store, name, model.ref.body, if_absent=True)
            raise

    def _check_unused(self, model: Model, force: bool) -> None:
        users = [] if force else self._registry.users(model.ref.name, model.ref.body["digest"])
        if users:
            more = f" and {len(users) - 3} more" if len(users) > 3 else ""
            raise FailedPrecondition(
                f"{model.ref.name} is needed by {', '.join(u.name for u in users[:3])}{more}; delete them first, or delete "
                "it by force: then its name is gone, and its bytes stay for them",
                reason="MODEL_IN_USE",
                metadata={"name": model.ref.name},
                violations=[Violation(user.name, user.why, "MODEL_IN_USE") for user in users],
            )

    def lineage(self, name: str, descendants: bool, depth: int) -> Lineage:
        """GetLineage."""
        if depth < 0:
            raise InvalidArgument("depth must not be negative", reason="DEPTH_INVALID")
        return self._registry.lineage(self._start(name), descendants, depth)

    def _start(self, name: str) -> str:
        """Where a lineage begins: a digest, or an endpoint's name."""
        if name.startswith("sha256:"):
            blob_name(name)
            if self._registry.manifest(name) is None:
                raise NotFound(f"artifact {name} is not in the store", reason="ARTIFACT_NOT_FOUND")
            return name
        if "/endpoints/" in name:
            names.parse(ENDPOINT, name)
            if all(held.holder != name for held in list_holds(self._store)):
                raise NotFound(f"there is no endpoint {name}", reason="ENDPOINT_NOT_FOUND", metadata={"name": name})
            return name
        for word, (pattern, reason) in STARTS.items():
            if word in name:
                return self._resolve(pattern, name, reason).digest
        return str(self.get_model(name).ref.body["digest"])

    def collect_garbage(self, grace_s: float, dry_run: bool) -> Iterator[garbage.Report]:
        """CollectGarbage."""
        if grace_s and grace_s < garbage.LEAST_GRACE_S:
            raise InvalidArgument(
                f"grace: {grace_s:g} s is too short; writers need {garbage.LEAST_GRACE_S:.0f} s at least to name what they "
                "wrote",
                reason="GRACE_TOO_SHORT",
                violations=[Violation("grace", f"must be at least {garbage.LEAST_GRACE_S:.0f} s", "GRACE_TOO_SHORT")],
            )
        return garbage.collect(self._store, grace_s or garbage.GRACE_S, dry_run)

    def download(self, name: str, path: str, offset: int) -> Iterator[bytes]:
        """One file's bytes from `offset` on. NotFound (FILE_NOT_FOUND), OutOfRange (OFFSET_WRONG), and after the last
        byte DataLoss (BLOB_CORRUPT): by digest if the whole file was read, else by size."""
        return stream_file(self._store, self.get_model(name).manifest.file(path), offset)

    def link(self, name: str, path: str, offset: int) -> str:
        """Where a client can GET a file's bytes itself; "" if it may not, or too few are left for it to be worth it."""
        file = self.get_model(name).manifest.file(path)
        worth = self._direct and offset >= 0 and file.size - offset > DIRECT_FROM_BYTES
        return self._store.link_blob(file.digest, LINK_VALID_S) if worth else ""

    # ------------------------------------------------------------------------------------------ tasks

    def _task(self, task: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if task == "import_model":
            return {task: self._import(arguments)}
        if arguments.get("dtype", "") not in DTYPES:
            raise InvalidArgument(
                f"unknown dtype {arguments['dtype']!r}; use {', '.join(DTYPES[1:])}", reason="DTYPE_UNKNOWN"
            )
        if task == "assemble":
            return {task: self._assemble(arguments)}
        if task == "adapter":
            return {task: self._adapter(arguments)}
        if task == "merge":
            return {task: self._merge(arguments)}
        if task == "reshard":
            size = _shard_size(arguments["max_shard_size_bytes"])
            return {task: outgoing.reshard(arguments, self._whole(arguments["model"]), size)}
        if task == "export":
            model = self.get_model(arguments["model"])
            ref = ArtifactRef(name=arguments["model"], digest=model.ref.body["digest"])
            return {task: outgoing.export(arguments, ref, model.manifest.kind, self._export_prefixes)}
        if task == "quantize":
            return {task: outgoing.quantize(arguments, self._whole(arguments["model"]), self._revision)}
        raise InvalidArgument(
            "a job needs one of import_model, assemble, adapter, merge, reshard, export, quantize",
            reason="TASK_MISSING",
        )

    def _revision(self, name: str) -> tuple[ArtifactRef, Manifest]:
        ref = self._resolve(REVISION, name, "REVISION_NOT_FOUND")
        return ref, self._manifest(ref.digest)

    def _import(self, arguments: Mapping[str, Any]) -> ImportTask:
        if arguments["dtype"] not in DTYPES:
            raise InvalidArgument(f"unknown dtype {arguments['dtype']!r}", reason="DTYPE_UNKNOWN")
        if arguments["template"]:
            check_name(arguments["template"])
        given = [k for k in ("hub_id", "local_path", "revision") if arguments[k]]
        if len(given) != 1:
            raise InvalidArgument("an import needs one of hub_id, local_path, revision", reason="TASK_MISSING")
        local = str(self._allowed(Path(arguments["local_path"]))) if arguments["local_path"] else ""
        revision = arguments["revision"]
        source = self._resolve(REVISION, revision, "REVISION_NOT_FOUND") if revision else None
        rest = {k: arguments[k] for k in ("hub_id", "file", "dtype", "template")}
        return ImportTask(source=source, local_path=local, **rest)

    def _allowed(self, path: Path) -> Path:
        """The place that `path` leads to, if it and all that lies in it are below an import root."""
        real = path.resolve()
        if not path.is_absolute() or not self._below_a_root(real):
            raise _forbidden(path)
        if not real.exists():
            raise NotFound(f"{path} does not exist on the service's machine", reason="MODEL_NOT_FOUND")
        # Models are flat folders; a link in one must not lead out to what the caller may not read.
        for inner in real.iterdir() if real.is_dir() else ():
            if not self._below_a_root(inner.resolve()):
                raise _forbidden(inner)
        return real

    def _below_a_root(self, real: Path) -> bool:
        return any(real.is_relative_to(root) for root in self._roots)

    def _merge(self, arguments: Mapping[str, Any]) -> MergeTask:
        adapter = self.get_model(arguments["adapter"])
        if adapter.manifest.kind != "adapter":
            raise FailedPrecondition(f"{arguments['adapter']} is no adapter", reason="MODEL_NOT_ADAPTER")
        own = next(p for p in adapter.manifest.parents if p.role == "base")
        base = ArtifactRef(name=own.name, digest=own.digest)
        if arguments["base"]:
            base = self._resolve(MODEL, arguments["base"], "MODEL_NOT_FOUND")
            if base.digest != own.digest:
                raise FailedPrecondition(
                    f"{arguments['adapter']} was trained on {own.name}, not on {base.name}", reason="BASE_MISMATCH"
                )
        named = ArtifactRef(name=arguments["adapter"], digest=adapter.ref.body["digest"])
        return outgoing.merge(arguments, named, base, _shard_size(arguments["max_shard_size_bytes"], 0))

    def _assemble(self, arguments: Mapping[str, Any]) -> AssembleTask:
        if not 0 <= arguments["seed"] < 1 << 60:
            raise InvalidArgument("seed must be from 0 to 2^60", reason="TASK_INVALID")
        return AssembleTask(
            vision_tower=self._whole(arguments["vision_tower"], ("vision_tower",), "MODEL_NOT_TOWER"),
            language_model=self._whole(arguments["language_model"]),
            seed=arguments["seed"],
            dtype=arguments["dtype"],
            feature_layer=arguments["feature_layer"] or -2,
            pad_to_square=arguments["pad_to_square"],
            max_shard_size_bytes=_shard_size(arguments["max_shard_size_bytes"]),
        )

    def _adapter(self, arguments: Mapping[str, Any]) -> AdapterTask:
        dtype, size, alpha = (arguments[k] for k in ("dtype", "max_shard_size_bytes", "lora_alpha"))
        if bool(arguments["checkpoint"]) == bool(arguments["revision"]):
            raise InvalidArgument("an adapter needs one of checkpoint, revision", reason="TASK_MISSING")
        if arguments["checkpoint"]:
            if arguments["base"] or alpha:
                raise InvalidArgument(
                    "a checkpoint knows its base and its lora_alpha: leave them out", reason="TASK_INVALID"
                )
            checkpoint = self._resolve(CHECKPOINT, arguments["checkpoint"], "CHECKPOINT_NOT_FOUND")
            if size and load(self._store, checkpoint.digest).meta["method"] != "full":
                raise InvalidArgument("an adapter is one file: leave its largest size out", reason="TASK_INVALID")
            return AdapterTask(checkpoint=checkpoint, dtype=dtype or "float32", max_shard_size_bytes=_shard_size(size))
        if not arguments["base"]:
            raise InvalidArgument("name the base that the revision was trained on", reason="TASK_INVALID")
        if not 0 <= alpha < 1e9:
            raise InvalidArgument("lora_alpha must not be negative", reason="TASK_INVALID")
        return AdapterTask(
            source=self._resolve(REVISION, arguments["revision"], "REVISION_NOT_FOUND"),
            base=self._whole(arguments["base"]),
            dtype=dtype or "float32",
            lora_alpha=alpha,
            max_shard_size_bytes=_shard_size(size),
        )

    def _whole(self, name: str, kinds: Sequence[str] = outgoing.WHOLE, reason: str = "MODEL_NOT_WHOLE") -> ArtifactRef:
        model = self.get_model(name)
        if model.manifest.kind not in kinds:
            wanted = " or ".join(kinds).upper()
            raise FailedPrecondition(
                f"{name} is of kind {model.manifest.kind.upper()}; name a {wanted} model", reason=reason
            )
        return ArtifactRef(name=name, digest=model.ref.body["digest"])

    def _resolve(self, pattern: str, name: str, reason: str) -> ArtifactRef:
        names.parse(pattern, name)
        ref = get_ref(self._store, name)
        if ref is None:
            raise NotFound(f"there is no {name}", reason=reason, metadata={"name": name})
        return ArtifactRef(name=name, digest=ref.body["digest"])


def _fields(model: Model) -> Mapping[str, Any]:
    """What models are filtered and ordered by."""
    body, meta = model.ref.body, model.manifest.meta
    return {
        **{k: body.get(k) for k in ("display_name", "digest", "source", "job", "labels", "create_time")},
        **{k: meta.get(k) for k in ("architecture", "template", "dtype")},
        "name": model.ref.name,
        "kind": model.manifest.kind.upper(),
        "base_model": meta.get("base_name"),
        "size_bytes": model.manifest.size,
        "parameter_count": meta.get("parameters", 0),
    }


def _notice(job: Record, event: Event) -> Event | None:
    """Rows that are prepared to calibrate with are no bytes of weights: their progress is not told."""
    return None if event["type"] == "progress" and "done_bytes" not in event else event


def _shard_size(given: int, otherwise: int = 2_000_000_000) -> int:
    if given < 0:
        raise InvalidArgument("max_shard_size_bytes must not be negative", reason="SHARD_SIZE_INVALID")
    return given or otherwise


def _forbidden(path: Path) -> PermissionDenied:
    return PermissionDenied(
        f"this service does not import from {path}; upload the files, or let its --import-roots name the place",
        reason="LOCAL_PATH_FORBIDDEN",
        metadata={"path": str(path)},
    )
