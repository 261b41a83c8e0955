"""A cluster in this process: the part of the Kubernetes API that a launcher meets, with pods that really run.

The API server keeps objects, versions them, checks them against Kubernetes' own strict schema, and lets an account do
what its Role in k8s/ allows. The Job controller makes pods, applies podFailurePolicy, and keeps what is deleted in the
foreground until its pods are gone; Services go with the Job that owns them, and make the names of its pods known. The
kubelet runs each pod's first container as a process of this machine.
Faults are `down`, `refusals`, `swallow` and the methods below `faults`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.common.launchers.pods import Command, Json, Refused, leave, matches, now, on_this_machine
from tests.k8s.rendered import VERSIONS, of_kind, overlay, problems

CORE = ("pods", "services")
JOB_LABEL = "batch.kubernetes.io/job-name"
UID_LABEL = "batch.kubernetes.io/controller-uid"
INDEX = "batch.kubernetes.io/job-completion-index"
TICK_S = 0.01


class Cluster:
    """See the module. `command` says what the kubelet runs for a pod: words, and variables beside its own."""

    def __init__(self, folder: Path, host: str = "127.0.0.1", command: Command | None = None) -> None:
        self.folder = folder
        self.host = host
        self.command = command or on_this_machine
        self.lock = threading.RLock()
        self.objects: dict[tuple[str, str], Json] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.kill_at: dict[str, float] = {}
        self.calls: list[tuple[str, str]] = []
        self.down = False
        self.refusals: list[int] = []  # the next requests are answered so, and not done
        self.swallow = 0  # so many requests are done, and their answers lost
        self.unschedulable = ""  # why no node takes a new pod
        self.image_missing = False
        self.lost_nodes: set[str] = set()  # pods on nodes that no longer report
        self.schema_version = VERSIONS[-1]
        self._versions = itertools.count(1)
        self._ended = threading.Event()
        manifests = overlay("local")
        self.rules = {m["metadata"]["name"]: m["rules"] for m in of_kind(manifests, "Role")}
        self.tokens = {account: uuid.uuid4().hex for account in self.rules}
        for cron in of_kind(manifests, "CronJob"):
            self._store("cronjobs", json.loads(json.dumps(cron)))

    # ------------------------------------------------------------------------------------------ its life

    def start(self) -> Cluster:
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                cluster.answer(self, json.loads(body) if body else {})

            do_GET = do_POST = do_DELETE = answer

        self.server = ThreadingHTTPServer((self.host, 0), Handler)
        self.server.daemon_threads = True
        self._threads = [
            threading.Thread(target=self.server.serve_forever, args=(0.02,)),
            threading.Thread(target=self._run),
        ]
        for thread in self._threads:
            thread.start()
        return self

    def close(self) -> None:
        self._ended.set()
        leave(self.server, self._threads, self.processes.values())

    def kubeconfig(self, account: str, name: str = "127.0.0.1") -> Path:
        """A file that lets a service account in, by a name of this machine."""
        path = self.folder / f"kubeconfig-{account}"
        host = f"http://{name}:{self.server.server_address[1]}"
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "quartet"}}],
            "clusters": [{"name": "c", "cluster": {"server": host}}],
            "users": [{"name": "u", "user": {"token": self.tokens[account]}}],
        }
        path.write_text(yaml.safe_dump(content))
        return path

    # ------------------------------------------------------------------------------------------ the API server

    def answer(self, http: BaseHTTPRequestHandler, body: Json) -> None:
        if self.down or self.refusals:
            code = 503 if self.down else self.refusals.pop(0)
            self._write(http, code, {"message": "the server is currently unable to handle the request"})
            return
        try:
            with self.lock:
                found = self._serve(http, body)
            code = 200
        except Refused as refused:
            code, found = refused.code, {"kind": "Status", "code": refused.code, "message": refused.message}
        if self.swallow and http.command != "GET":
            self.swallow -= 1
            http.close_connection = True
            return
        self._write(http, code, found)

    @staticmethod
    def _write(http: BaseHTTPRequestHandler, code: int, found: Json | str) -> None:
        data = (found if isinstance(found, str) else json.dumps(found)).encode()
        with contextlib.suppress(ConnectionError):
            http.send_response(code)
            http.send_header("Content-Type", "application/json")
            http.send_header("Content-Length", str(len(data)))
            http.end_headers()
            http.wfile.write(data)

    def _serve(self, http: BaseHTTPRequestHandler, body: Json) -> Json | str:
        url = urlsplit(http.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        shown = http.headers.get("Authorization", "").removeprefix("Bearer ")
        account = next((a for a, token in self.tokens.items() if token == shown), "")
        if not account:
            raise Refused(401, "Unauthorized")
        parts = url.path.strip("/").split("/")
        root, plural, rest = parts[: parts.index("namespaces")], *self._split(parts, account)
        name, sub = (*rest, "", "")[:2]
        if root != (["api", "v1"] if plural in CORE else ["apis", "batch", "v1"]):
            raise Refused(404, f"the server could not find the requested resource {url.path}")
        verb = {"GET": "get" if name else "list", "POST": "create", "DELETE": "delete"}[http.command]
        self._allow(account, verb, f"{plural}/{sub}" if sub else plural, name)
        if sub == "log":
            return self._log(name, int(query["tailLines"]))
        if verb == "list":
            return {"items": [o for (p, _), o in self.objects.items() if p == plural and matches(o, query)]}
        if verb == "create":
            return self._create(plural, body)
        found = self._get(plural, name)
        if verb == "delete":
            if body.get("preconditions", {}).get("uid", found["metadata"]["uid"]) != found["metadata"]["uid"]:
                raise Refused(409, "the UID in the precondition does not match")
            self._delete(plural, found, body)
        return found

    def _split(self, parts: list[str], account: str) -> tuple[str, list[str]]:
        at = parts.index("namespaces")
        if parts[at + 1] != "quartet":
            raise Refused(403, f"{account} cannot do this in the namespace {parts[at + 1]}")
        return parts[at + 2], parts[at + 3 :]

    def _allow(self, account: str, verb: str, resource: str, name: str) -> None:
        self.calls.append((verb, resource))
        for rule in self.rules[account]:
            named = not rule.get("resourceNames") or name in rule["resourceNames"]
            if resource in rule["resources"] and verb in rule["verbs"] and named:
                return
        raise Refused(403, f'User "system:serviceaccount:quartet:{account}" cannot {verb} resource "{resource}"')

    def _get(self, plural: str, name: str) -> Json:
        if (plural, name) not in self.objects:
            raise Refused(404, f'{plural} "{name}" not found')
        return self.objects[plural, name]

    def _create(self, plural: str, body: Json) -> Json:
        wrong = problems(body, self.schema_version)
        if wrong:
            raise Refused(400, "; ".join(wrong))
        if (plural, body["metadata"]["name"]) in self.objects:
            raise Refused(409, f'{plural} "{body["metadata"]["name"]}" already exists')
        return self._store(plural, {**body, "status": {}})

    def _store(self, plural: str, body: Json) -> Json:
        made = {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "resourceVersion": str(next(self._versions))}
        body["metadata"].update(made)
        self.objects[plural, body["metadata"]["name"]] = body
        return body

    def _delete(self, plural: str, found: Json, options: Json) -> None:
        if plural == "jobs":
            assert options["propagationPolicy"] == "Foreground"
            found["metadata"].setdefault("deletionTimestamp", now())
            return
        grace = options.get("gracePeriodSeconds", found["spec"].get("terminationGracePeriodSeconds", 30))
        self._terminate(found, grace)

    def _terminate(self, pod: Json, grace_s: float) -> None:
        name = pod["metadata"]["name"]
        due = time.monotonic() + grace_s
        first = "deletionTimestamp" not in pod["metadata"]
        if first or due < self.kill_at.get(name, due):
            pod["metadata"]["deletionTimestamp"] = now(grace_s)
            self.kill_at[name] = due
        if first and name in self.processes and name not in self.lost_nodes:
            self._signal(name, signal.SIGTERM)

    def _log(self, name: str, lines: int) -> str:
        self._get("pods", name)
        path = self.folder / f"{name}.log"
        if not path.exists():
            raise Refused(400, "container is waiting to start: ContainerCreating")
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])

    # ------------------------------------------------------------------------------------------ controllers

    def _run(self) -> None:
        while not self._ended.wait(TICK_S):
            with self.lock:
                for pod in self.pods():
                    self._kubelet(pod)
                for job in [o for (p, _), o in self.objects.items() if p == "jobs"]:
                    self._job_controller(job)

    def pods(self, job: str = "") -> list[Json]:
        found = [o for (p, _), o in self.objects.items() if p == "pods"]
        return [o for o in found if not job or o["metadata"]["labels"][JOB_LABEL] == job]

    def _kubelet(self, pod: Json) -> None:
        name, status = pod["metadata"]["name"], pod["status"]
        if name in self.lost_nodes or status["phase"] in ("Succeeded", "Failed"):
            return
        deleted = "deletionTimestamp" in pod["metadata"]
        process = self.processes.get(name)
        if process is None:
            master = next((e["value"] for e in pod["spec"]["containers"][0]["env"] if e["name"] == "MASTER_ADDR"), "")
            if deleted:
                status["phase"] = "Failed"
            elif self.unschedulable:
                told = {"reason": "Unschedulable", "message": self.unschedulable}
                status["conditions"] = [{"type": "PodScheduled", "status": "False", **told}]
            elif self.image_missing:
                waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "quartet/worker:0.1.0-cpu"'}
                status.update(conditions=[], containerStatuses=[{"state": {"waiting": waiting}}])
            elif not master or self.resolves(master):  # a name that is not known yet is asked for until it is
                self._begin(pod)
            return
        code = process.poll()
        if code is None:
            if deleted and time.monotonic() > self.kill_at[name]:
                self._signal(name, signal.SIGKILL)
            return
        ended = {"exitCode": code if code >= 0 else 128 - code, "reason": "Completed" if code == 0 else "Error"}
        ended["finishedAt"] = now()
        if ended["exitCode"] == 137 and name in self.out_of_memory:
            ended["reason"] = "OOMKilled"
        status.update(phase="Failed" if code else "Succeeded", containerStatuses=[{"state": {"terminated": ended}}])

    out_of_memory: frozenset[str] = frozenset()

    def resolves(self, host: str) -> bool:
        """Whether <pod's hostname>.<headless Service> has an address."""
        hostname, _, subdomain = host.partition(".")
        service = self.objects.get(("services", subdomain), {"spec": {}})["spec"]
        if service.get("clusterIP") != "None" or not service["publishNotReadyAddresses"]:
            return False
        found = [p for p in self.pods() if service["selector"].items() <= p["metadata"]["labels"].items()]
        return any((p["spec"].get("hostname"), p["spec"].get("subdomain")) == (hostname, subdomain) for p in found)

    def _begin(self, pod: Json) -> None:
        words, variables = self.command(pod)
        with (self.folder / f"{pod['metadata']['name']}.log").open("ab") as log:
            process = subprocess.Popen(
                words,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes[pod["metadata"]["name"]] = process
        pod["status"].update(phase="Running", conditions=[], containerStatuses=[{"state": {"running": {}}}])

    def _signal(self, name: str, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[name].pid, number)

    def _job_controller(self, job: Json) -> None:
        name, meta, status = job["metadata"]["name"], job["metadata"], job["status"]
        own = self.pods(name)
        for pod in [p for p in own if p["status"]["phase"] in ("Succeeded", "Failed")]:
            self._count(job, pod)
            if "deletionTimestamp" in pod["metadata"]:
                del self.objects["pods", pod["metadata"]["name"]]
                own.remove(pod)
        if "deletionTimestamp" in meta:
            for pod in own:
                if pod["status"]["phase"] in ("Succeeded", "Failed"):
                    del self.objects["pods", pod["metadata"]["name"]]
                else:
                    self._terminate(pod, pod["spec"].get("terminationGracePeriodSeconds", 30))
            if not self.pods(name):
                del self.objects["jobs", name]
                for key, thing in list(self.objects.items()):
                    if meta["uid"] in [o["uid"] for o in thing["metadata"].get("ownerReferences", ())]:
                        del self.objects[key]
            return
        active = [p for p in own if p["status"]["phase"] not in ("Succeeded", "Failed")]
        failing = any(c["type"] == "FailureTarget" for c in status.get("conditions", ()))
        if job["spec"].get("suspend") or failing:
            for pod in active:
                self._terminate(pod, pod["spec"].get("terminationGracePeriodSeconds", 30))
            if failing and not active and len(status["conditions"]) == 1:
                status["conditions"].append({**status["conditions"][0], "type": "Failed"})
        elif not status.get("conditions"):
            there = {_index(p) for p in own if p in active or p["status"]["phase"] == "Succeeded"}
            for index in range(job["spec"]["completions"]):
                if index not in there:
                    self._make_pod(job, index)

    def _count(self, job: Json, pod: Json) -> None:
        """Take a pod that ended into account, once."""
        if pod["metadata"].setdefault("counted", False) or job["status"].get("conditions"):
            return
        pod["metadata"]["counted"] = True
        if pod["status"]["phase"] == "Succeeded":
            done = {_index(p) for p in self.pods(job["metadata"]["name"]) if p["status"]["phase"] == "Succeeded"}
            if len(done) == job["spec"]["completions"]:
                job["status"]["conditions"] = [{"type": "Complete", "status": "True"}]
            return
        action, message = self._action(job, pod)
        if action != "Ignore" and not job["spec"].get("suspend"):
            why = "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
            told = {"type": "FailureTarget", "status": "True", "reason": why, "message": message}
            job["status"]["conditions"] = [told]

    @staticmethod
    def _action(job: Json, pod: Json) -> tuple[str, str]:
        """What the Job's policy says of a failed pod, and the controller's words for it."""
        name = f"{pod['metadata'].get('namespace', 'quartet')}/{pod['metadata']['name']}"
        states = pod["status"].get("containerStatuses") or [{}]
        code = states[0].get("state", {}).get("terminated", {}).get("exitCode")
        on_pod = {(c["type"], c["status"]) for c in pod["status"].get("conditions", ())}
        for number, rule in enumerate(job["spec"]["podFailurePolicy"]["rules"]):
            matching = f"matching {rule['action']} rule at index {number}"
            if code in rule.get("onExitCodes", {}).get("values", ()):
                return rule["action"], f"Container worker for pod {name} failed with exit code {code} {matching}"
            for kind, _ in on_pod & {(c["type"], c["status"]) for c in rule.get("onPodConditions", ())}:
                return rule["action"], f"Pod {name} has condition {kind} {matching}"
        assert job["spec"]["backoffLimit"] == 0
        return "Count", "Job has reached the specified backoff limit"

    def _make_pod(self, job: Json, index: int) -> None:
        template = json.loads(json.dumps(job["spec"]["template"]))
        template["metadata"]["labels"][JOB_LABEL] = job["metadata"]["name"]
        template["metadata"]["labels"][UID_LABEL] = job["metadata"]["uid"]
        template["metadata"]["name"] = f"{job['metadata']['name'][:57]}-{uuid.uuid4().hex[:5]}"
        if job["spec"].get("completionMode") == "Indexed":
            template["metadata"].setdefault("annotations", {})[INDEX] = str(index)
            template["metadata"]["labels"][INDEX] = str(index)
            template["metadata"]["name"] = f"{job['metadata']['name']}-{index}-{uuid.uuid4().hex[:5]}"
            template["spec"]["hostname"] = f"{job['metadata']['name']}-{index}"
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        assert problems(pod, self.schema_version) == []
        self._store("pods", {**pod, "status": {"phase": "Pending"}})

    # ------------------------------------------------------------------------------------------ faults

    def pod_of(self, handle: Mapping[str, Any], index: int = 0) -> str:
        """The newest pod of a Job, or of one of its nodes, once it has one that runs."""
        deadline = time.monotonic() + 20
        while True:
            with self.lock:
                own = [p for p in self.pods(handle["job"]) if _index(p) == index]
                found = [p["metadata"]["name"] for p in own if p["status"]["phase"] == "Running"]
            if found:
                return str(found[-1])
            assert time.monotonic() < deadline
            time.sleep(TICK_S)

    def pid_of(self, handle: Mapping[str, Any]) -> int:
        return self.processes[self.pod_of(handle)].pid

    def evict(self, pod: str, grace_s: float = 30.0, reason: str = "EvictionByEvictionAPI") -> None:
        with self.lock:
            self._disrupt(pod, reason)
            self._terminate(self.objects["pods", pod], grace_s)

    def lose_node(self, pod: str, ago_s: float) -> None:
        """The node went silent; the pod was given up `ago_s` seconds ago, and nobody can confirm its end."""
        with self.lock:
            self.lost_nodes.add(pod)
            self._disrupt(pod, "DeletionByTaintManager")
            self.objects["pods", pod]["metadata"]["deletionTimestamp"] = now(-ago_s)

    def kill_for_memory(self, pod: str) -> None:
        with self.lock:
            self.out_of_memory = self.out_of_memory | {pod}
            self._signal(pod, signal.SIGKILL)

    def suspend(self, job: str, suspended: bool) -> None:
        """What Kueue does to preempt a Job, and to admit it again."""
        with self.lock:
            self.objects["jobs", job]["spec"]["suspend"] = suspended

    def _disrupt(self, pod: str, reason: str) -> None:
        told = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": f"{pod} was taken away"}
        self.objects["pods", pod]["status"].setdefault("conditions", []).append(told)


def _index(pod: Json) -> int:
    return int(pod["metadata"]["labels"].get(INDEX, "0"))


@contextlib.contextmanager
def cluster(folder: Path, host: str = "127.0.0.1", command: Command | None = None) -> Iterator[Cluster]:
    folder.mkdir(parents=True, exist_ok=True)
    running = Cluster(folder, host, command).start()
    try:
        yield running
    finally:
        running.close()
