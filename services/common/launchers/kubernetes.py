"""Jobs of a Kubernetes cluster, made from a blueprint: a suspended CronJob whose jobTemplate is filled in.

A Job is one attempt, on one node or many: with many it is an Indexed Job, whose pods meet at the first one's name in a
headless Service of the Job's own. Its name follows from the attempt's, so making it twice makes it once, and a service
that was cut finds it again. Two lists, at most every POLL_S, tell of all Jobs: no watch, so none that can break off,
expire or miss.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config

from services.common.launchers import ONE, Handle, Shape
from services.finetune.errors import FailedPrecondition, PermissionDenied, QuartetError, Unavailable

POLL_S = 2.0
LOST_AFTER_S = 30.0
"""A pod so long past its own end is on a node that nobody hears of any more."""
TIMEOUT_S = (3.0, 10.0)
FENCED_STATUS = 75
"""With this a worker leaves that found its attempt taken: by an earlier pod of the same Job, which was disrupted."""
MADE_BY = "app.kubernetes.io/managed-by"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
ROOTS = {"cronjobs": "apis/batch/v1", "jobs": "apis/batch/v1", "pods": "api/v1", "services": "api/v1"}
RANK = "batch.kubernetes.io/job-completion-index"
GPU = "nvidia.com/gpu"
MASTER_PORT = 29500

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Seen:
    """A Job with its pods. `job` is None if there is none of that name."""

    job: Json | None
    pods: Sequence[Json]


class KubernetesLauncher:
    """See Launcher. FailedPrecondition (CLUSTER_UNKNOWN) if neither a pod's account nor a kubeconfig tells of a cluster."""

    def __init__(self, namespace: str, blueprint: str) -> None:
        self._api = Api(namespace)
        self._blueprint = blueprint
        self._lock = threading.Lock()
        self._seen: Mapping[str, Seen] = {}
        self._seen_at = -POLL_S
        self._disrupted: set[str] = set()  # uids: a pod that was taken away is forgotten soon by the cluster

    def launch(self, command: Sequence[str], name: str, env: Mapping[str, str], shape: Shape = ONE) -> Handle:
        cron = self._api.get(f"cronjobs/{self._blueprint}")
        if cron is None:
            raise FailedPrecondition(
                f"there is no CronJob {self._blueprint} in the namespace {self._api.namespace}: apply k8s/, or set "
                "--blueprint",
                reason="BLUEPRINT_MISSING",
            )
        job = filled(cron["spec"]["jobTemplate"], self._blueprint, job_name(name), command[1:], env)
        if shape != ONE:
            job = shaped(job, shape)
        made = self._api.create("jobs", job) or self._api.get(f"jobs/{job_name(name)}")
        if made is None:
            raise Unavailable(f"the Job {job_name(name)} ended while it was made", reason="CLUSTER_UNAVAILABLE")
        self._meet(made)
        return _handle(made)

    def find(self, name: str, claim: Mapping[str, Any] | None) -> Handle | None:
        job = self._api.get(f"jobs/{job_name(name)}")
        if job is None:
            return None
        self._meet(job)  # the service may have been cut before it made this
        return _handle(job)

    def _meet(self, job: Json) -> None:
        """The Service by which the pods of a Job of several nodes find the first. It goes when the Job goes."""
        if job["spec"].get("completionMode") == "Indexed":
            self._api.create("services", meeting(job))

    def alive(self, handle: Handle) -> bool:
        seen = self._look(handle)
        if seen.job is None or _finished(seen.job):
            return False
        # A worker claims its attempt once. After a pod that ran and was taken away the Job makes another, which would
        # only find the attempt taken: a new attempt need not wait for that.
        return not any(_disrupted(pod) and _ran(pod) and _gone(pod) for pod in seen.pods)

    def disrupted(self, handle: Handle) -> bool:
        seen = self._look(handle)
        if any(_exit_status(pod) == FENCED_STATUS for pod in seen.pods) or (seen.job and _taken(seen.job)):
            return True
        return handle["uid"] in self._disrupted

    def broken(self, handle: Handle) -> bool:
        with self._lock:
            self._seen_at = -POLL_S  # what is kept may be older than the failure
        return any(
            (_exit_status(p) or 0) not in (0, FENCED_STATUS) and not _disrupted(p) for p in self._look(handle).pods
        )

    def trouble(self, handle: Handle) -> str:
        return next((told for pod in self._look(handle).pods if (told := _why_waiting(pod))), "")

    def stop(self, handle: Handle, grace_s: float) -> None:
        # Foreground: the Job is there, and counts as alive, until its pods are gone.
        body = {"propagationPolicy": "Foreground", "preconditions": {"uid": handle["uid"]}}
        self._api.delete(f"jobs/{handle['job']}", body)
        for pod in self._api.list("pods", f"batch.kubernetes.io/controller-uid={handle['uid']}"):
            # The API takes 0 for "at once, and forget it": the kubelet would not be waited for.
            self._api.delete(f"pods/{pod['metadata']['name']}", {"gracePeriodSeconds": max(1, round(grace_s))})
        with self._lock:
            self._seen_at = -POLL_S

    def tail(self, name: str, lines: int) -> str:
        pods = self._api.list("pods", f"batch.kubernetes.io/job-name={job_name(name)}")
        if not pods:
            return ""
        # Of several nodes the first to fail says why; the others end because it did.
        failed = [pod for pod in pods if (_exit_status(pod) or 0) != 0]
        last = (
            min(failed, key=lambda pod: str(_state(pod)["terminated"].get("finishedAt", "")))
            if failed
            else max(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
        )
        text = self._api.text(f"pods/{last['metadata']['name']}/log", {"tailLines": lines})
        return "\n".join(part for part in (text.strip(), _why_ended(last) or _why_waiting(last)) if part)

    def _look(self, handle: Handle) -> Seen:
        """What the last lists told of a Job, if they are fresh; and a look of its own where they do not tell of it."""
        with self._lock:
            if time.monotonic() - self._seen_at >= POLL_S:
                self._list()
            seen = self._seen.get(handle["job"])
        if seen is None:
            # Lists come from a cache of the API server, which may be older than the Job.
            seen = Seen(self._api.get(f"jobs/{handle['job']}"), ())
        if seen.job is not None and seen.job["metadata"]["uid"] != handle["uid"]:
            return Seen(None, ())
        return seen

    def _list(self) -> None:
        ours = f"{MADE_BY}={self._blueprint}"
        pods: dict[str, list[Json]] = {}
        for pod in self._api.list("pods", ours):
            pods.setdefault(pod["metadata"]["labels"].get("batch.kubernetes.io/job-name", ""), []).append(pod)
        jobs = self._api.list("jobs", ours)
        self._seen = {j["metadata"]["name"]: Seen(j, pods.get(j["metadata"]["name"], ())) for j in jobs}
        self._seen_at = time.monotonic()
        now = {s.job["metadata"]["uid"] for s in self._seen.values() if s.job and any(map(_disrupted, s.pods))}
        self._disrupted = {j["metadata"]["uid"] for j in jobs} & self._disrupted | now


class Api:
    """The few calls that a launcher makes, as plain JSON in one namespace. The client finds the cluster and shows who asks.

    Paths are ``<plural>[/<name>]``. Unavailable (CLUSTER_UNAVAILABLE), PermissionDenied
    (CLUSTER_REFUSED), FailedPrecondition (JOB_REFUSED: the cluster finds fault with what was asked for).
    """

    def __init__(self, namespace: str) -> None:
        settings = client.Configuration()
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=settings)
                own = NAMESPACE_FILE.read_text().strip()
            else:
                config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=settings)
                _, context = config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))
                own = context["context"].get("namespace", "default")
        except (config.ConfigException, OSError) as error:
            raise FailedPrecondition(
                f"no Kubernetes cluster: {error}; run in a pod with its account's token mounted, or set KUBECONFIG",
                reason="CLUSTER_UNKNOWN",
            ) from error
        settings.retries = 1
        self.namespace = namespace or own
        self._client = client.ApiClient(settings)

    def get(self, path: str) -> Json | None:
        """None if there is none."""
        return self._json("GET", path, absent=404)

    def create(self, path: str, body: Json) -> Json | None:
        """None if there is one of that name."""
        return self._json("POST", path, {"fieldValidation": "Strict"}, body, absent=409)

    def delete(self, path: str, options: Json) -> None:
        """Nothing happens if there is none, or another of that name."""
        self._json("DELETE", path, body=options, absent=404)

    def list(self, path: str, labels: str) -> Sequence[Json]:
        """Those with these labels, as the API server remembers them: cheap for it, and perhaps a moment old."""
        found = self._json("GET", path, {"labelSelector": labels, "resourceVersion": "0"})
        items: Sequence[Json] = found["items"] if found else ()
        return items

    def text(self, path: str, query: Json) -> str:
        """Empty where there is none yet, or no more."""
        status, body = self._call("GET", path, query)
        return body if status == 200 else ""

    def _json(
        self, method: str, path: str, query: Json | None = None, body: Json | None = None, absent: int = 0
    ) -> Json | None:
        status, text = self._call(method, path, query, body)
        if 200 <= status < 300:
            found: Json = json.loads(text)
            return found
        # A precondition that fails is a 409 as well: what was meant is gone, and another has its name.
        if status == absent or (method == "DELETE" and status == 409):
            return None
        raise _error(method, path, status, text)

    def _call(self, method: str, path: str, query: Json | None = None, body: Json | None = None) -> tuple[int, str]:
        url = f"/{ROOTS[path.partition('/')[0]]}/namespaces/{self.namespace}/{path}"
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        try:
            request = self._client.param_serialize(
                method,
                url,
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            answer = self._client.call_api(*request, _request_timeout=TIMEOUT_S)
            return int(answer.status), (answer.read() or b"").decode(errors="replace")
        except client.ApiException as error:
            return int(error.status or 0), str(error.body or error.reason)
        except urllib3.exceptions.HTTPError as error:
            return 0, str(error)


def job_name(name: str) -> str:
    """The DNS label for an attempt's name: readable, as unique as it, and with place for the index of a pod."""
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:46].strip("-")
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def filled(template: Json, blueprint: str, name: str, arguments: Sequence[str], env: Mapping[str, str]) -> Json:
    """The Job that a blueprint makes. Its first container runs the arguments."""
    job: Json = json.loads(json.dumps({"apiVersion": "batch/v1", "kind": "Job", **template}))
    metadata, pod = job.setdefault("metadata", {}), job["spec"]["template"]
    metadata["name"] = name
    for labelled in (metadata, pod.setdefault("metadata", {})):
        labelled.setdefault("labels", {})[MADE_BY] = blueprint
    container = pod["spec"]["containers"][0]
    container["args"] = list(arguments)
    container["env"] = [*container.get("env", ()), *({"name": k, "value": v} for k, v in env.items())]
    return job


def shaped(job: Json, shape: Shape) -> Json:
    """A Job for so many nodes and GPUs. CPUs and memory grow with the GPUs; a blueprint without any stays as it is."""
    job = json.loads(json.dumps(job))
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    limits = container["resources"]["limits"]
    if GPU in limits and shape.gpus_per_node:
        factor = Fraction(shape.gpus_per_node, int(limits[GPU]))
        for bound in container["resources"].values():
            bound.update({k: times(v, factor) for k, v in bound.items() if k in (GPU, "cpu", "memory")})
    if shape.nodes > 1:
        name = job["metadata"]["name"]
        job["spec"].update(completionMode="Indexed", completions=shape.nodes, parallelism=shape.nodes)
        # A pod made again could not join the others: the first that its place takes away ends all, and the Job says so.
        for rule in job["spec"]["podFailurePolicy"]["rules"]:
            rule["action"] = "FailJob"
        # Each pod gets the host name <job>-<index>, and by this a name in DNS.
        pod["subdomain"] = name
        rank = {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{RANK}']"}}}
        told = {"NNODES": str(shape.nodes), "MASTER_ADDR": f"{name}-0.{name}", "MASTER_PORT": str(MASTER_PORT)}
        container["env"] = [*container["env"], *({"name": k, "value": v} for k, v in told.items()), rank]
    return job


def times(quantity: str, factor: Fraction) -> str:
    """A Kubernetes quantity (4, 500m, 32Gi) so many times, rounded up to its own unit."""
    found = re.fullmatch(r"(\d+)([A-Za-z]*)", str(quantity))
    if found is None:
        raise FailedPrecondition(
            f"the blueprint's quantity {quantity!r} is no whole number with a unit: write 1500m for 1.5",
            reason="JOB_REFUSED",
        )
    return f"{ceil(int(found[1]) * factor)}{found[2]}"


def meeting(job: Json) -> Json:
    """The headless Service of a Job's pods. Names are there before the pods are ready, for that is when they meet."""
    name, owner = job["metadata"]["name"], {"apiVersion": "batch/v1", "kind": "Job"}
    metadata = {
        "name": name,
        "labels": {MADE_BY: job["metadata"]["labels"][MADE_BY]},
        "ownerReferences": [{**owner, "name": name, "uid": job["metadata"]["uid"], "controller": True}],
    }
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": name},
        "ports": [{"name": "rendezvous", "port": MASTER_PORT}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def _handle(job: Json) -> Handle:
    return {"job": job["metadata"]["name"], "uid": job["metadata"]["uid"]}


def _error(method: str, path: str, status: int, text: str) -> QuartetError:
    try:
        told = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        told = text[:300]
    if status in (401, 403):
        return PermissionDenied(f"the cluster refuses {method} {path}: {told}", reason="CLUSTER_REFUSED")
    if status in (0, 408, 409, 410, 429) or status >= 500:
        return Unavailable(f"the cluster does not answer {method} {path}: {told}", reason="CLUSTER_UNAVAILABLE")
    return FailedPrecondition(f"the cluster finds fault with {method} {path}: {told}", reason="JOB_REFUSED")


def _conditions(thing: Json) -> Mapping[str, Json]:
    return {c["type"]: c for c in thing.get("status", {}).get("conditions") or () if c["status"] == "True"}


def _finished(job: Json) -> bool:
    return not _conditions(job).keys().isdisjoint({"Complete", "Failed"})


def _taken(job: Json) -> bool:
    """Whether it failed because a pod was taken away: the policy's message names the condition that it matched."""
    failed = [c for kind, c in _conditions(job).items() if kind in ("Failed", "FailureTarget")]
    return any(c.get("reason") == "PodFailurePolicy" and "DisruptionTarget" in c.get("message", "") for c in failed)


def _disrupted(pod: Json) -> bool:
    return "DisruptionTarget" in _conditions(pod)


def _state(pod: Json) -> Json:
    """The state of the container that does the work."""
    states = pod.get("status", {}).get("containerStatuses") or [{}]
    found: Json = states[0].get("state") or {}
    return found


def _ran(pod: Json) -> bool:
    return not {"running", "terminated"}.isdisjoint(_state(pod))


def _gone(pod: Json) -> bool:
    if pod["status"].get("phase") in ("Succeeded", "Failed"):
        return True
    due = pod["metadata"].get("deletionTimestamp")
    return due is not None and (datetime.now(UTC) - datetime.fromisoformat(due)).total_seconds() > LOST_AFTER_S


def _exit_status(pod: Json) -> int | None:
    status: int | None = _state(pod).get("terminated", {}).get("exitCode")
    return status


def _why_waiting(pod: Json) -> str:
    """Why a pod does not run: no node takes it, its image cannot be had, its secrets are not there."""
    unplaced = pod.get("status", {}).get("conditions") or ()
    for condition in unplaced:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason', 'Unschedulable')}: {condition.get('message', '')}".strip(": ")
    waiting = _state(pod).get("waiting", {})
    if waiting.get("reason", "ContainerCreating") in ("ContainerCreating", "PodInitializing"):
        return ""
    return f"{waiting['reason']}: {waiting.get('message', '')}".strip(": ")


def _why_ended(pod: Json) -> str:
    taken = _conditions(pod).get("DisruptionTarget")
    if taken:
        return f"{taken.get('reason', 'disrupted')}: {taken.get('message', '')}".strip(": ")
    ended = _state(pod).get("terminated", {})
    if ended.get("reason") == "OOMKilled":
        return (
            "OOMKilled: it took more memory than its limit; raise the limit in the blueprint, or lower the batch size"
        )
    return pod.get("status", {}).get("message") or ""
