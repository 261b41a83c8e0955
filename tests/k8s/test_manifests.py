"""Each overlay, alone and with each component: valid, and up to the baseline that docs/operations.md promises."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from services.client.client import Client
from services.common.server import DRAIN_S, LEAVE_S
from services.common.settings import Settings
from services.finetune.errors import BY_CODE
from services.finetune.store import cache
from services.gateway import __main__ as gateway
from services.inference.engines.__main__ import HOST_VARIABLE, METRICS_VARIABLE, PORT_VARIABLE
from tests.k8s.rendered import (
    ROOMS,
    VERSIONS,
    Manifest,
    containers,
    of_kind,
    overlay,
    pods,
    problems,
    variables,
    with_components,
)

LAUNCHING = {room: "quartet-engine" if room == "inference" else "quartet-worker" for room in ROOMS}


@pytest.mark.parametrize("version", VERSIONS)
def test_valid_for(version: str, manifests: list[Manifest]) -> None:
    assert [p for m in manifests for p in problems(m, version)] == []


def test_a_wrong_field_is_found() -> None:
    """The schemas are the strict ones: what the API server would drop in silence is an error here."""
    broken = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": {"bakoffLimit": 1}}
    assert len(problems(broken, VERSIONS[-1])) == 2  # the misspelt field, and no template


def test_every_pod_is_restricted(manifests: list[Manifest]) -> None:
    for name, container, spec in containers(manifests):
        pod, own = spec["securityContext"], container["securityContext"]
        assert pod["runAsNonRoot"] is True and pod["runAsUser"] > 0, name
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert own["allowPrivilegeEscalation"] is False, name
        assert own["capabilities"] == {"drop": ["ALL"]}, name
        assert own["readOnlyRootFilesystem"] is True, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        assert not {"privileged", "procMount", "runAsUser"} & own.keys(), name
        for volume in spec.get("volumes", ()):
            assert "hostPath" not in volume, name
            assert volume.get("emptyDir", {"sizeLimit": 1}).get("sizeLimit"), (name, volume)


def test_only_claims_and_scratch_can_be_written(manifests: list[Manifest]) -> None:
    claims = {
        c["metadata"]["name"] for m in of_kind(manifests, "StatefulSet") for c in m["spec"]["volumeClaimTemplates"]
    }
    for name, container, spec in containers(manifests):
        kinds = {v["name"]: v for v in spec.get("volumes", ())}
        for mount in container.get("volumeMounts", ()):
            scratch = mount["name"] in claims or kinds[mount["name"]].keys() & {"emptyDir", "persistentVolumeClaim"}
            assert scratch or mount.get("readOnly"), (name, mount)
        assert any(m["mountPath"] == "/tmp" for m in container["volumeMounts"]), (
            f"{name} has no place for temporary files"
        )


def test_every_container_has_requests_and_limits(manifests: list[Manifest]) -> None:
    for name, container, _ in containers(manifests):
        for bound in ("requests", "limits"):
            assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"][bound].keys(), (name, bound)


def test_images_are_pinned(manifests: list[Manifest]) -> None:
    for name, container, _ in containers(manifests):
        tag = re.fullmatch(r"[a-z0-9./-]+(?::([\w.-]+))?(@sha256:[0-9a-f]{64})?", container["image"])
        assert tag and (tag[1] or tag[2]) and tag[1] != "latest", (name, container["image"])


def test_a_token_for_the_api_goes_to_those_only_who_make_jobs(manifests: list[Manifest]) -> None:
    asking = {name for name, pod in pods(manifests) if pod["spec"]["automountServiceAccountToken"]}
    assert asking == {f"quartet-{room}" for room in LAUNCHING}
    for account in of_kind(manifests, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    names = [pod["spec"]["serviceAccountName"] for _, pod in pods(manifests)]
    assert len(set(names)) == len(names), "an account is shared"


def test_rights_are_the_launchers_calls(manifests: list[Manifest]) -> None:
    roles = {m["metadata"]["name"]: m["rules"] for m in of_kind(manifests, "Role")}
    assert not of_kind(manifests, "ClusterRole", "ClusterRoleBinding")
    assert roles.keys() == {f"quartet-{room}" for room in LAUNCHING}
    for room, blueprint in LAUNCHING.items():
        rights = {
            (r["resources"][0], v, *r.get("resourceNames", ())) for r in roles[f"quartet-{room}"] for v in r["verbs"]
        }
        assert rights == {
            ("cronjobs", "get", blueprint),
            *(("jobs", verb) for verb in ("create", "get", "list", "delete")),
            *(("pods", verb) for verb in ("list", "delete")),
            ("pods/log", "get"),
            *([("services", "create")] if room == "training" else ()),  # for jobs of several nodes
        }


def test_servers_are_probed_in_their_own_words(manifests: list[Manifest]) -> None:
    for name, container, spec in containers(manifests):
        if name.startswith("quartet-worker/"):
            continue  # it serves nothing; its life is its Job's
        probes = [container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
        if name.split("/")[1] in (*ROOMS, "engine"):
            room = "inference" if "engine" in name else name.split("/")[1]
            service = f"quartet.{room}.v1.{room.capitalize()}"
            [port] = [p["containerPort"] for p in container["ports"] if p["name"] == "grpc"]
            assert [p["grpc"] for p in probes] == [{"port": port, "service": service}] * 2 + [{"port": port}], name
        if name == "quartet-gateway/gateway":
            assert [p["httpGet"] for p in probes] == [{"path": "/healthz", "port": "http"}] * 3
        assert spec["terminationGracePeriodSeconds"] > DRAIN_S, name


def test_a_rolling_update_leaves_time_to_leave(manifests: list[Manifest]) -> None:
    """New pods are there before old ones go, and these may let calls end before they are killed."""
    for m in of_kind(manifests, "Deployment"):
        assert m["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        assert m["spec"]["minReadySeconds"] >= 5
        pod = m["spec"]["template"]["spec"]
        pause = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pause + LEAVE_S + DRAIN_S < pod["terminationGracePeriodSeconds"]


def test_every_service_has_a_second_replica_or_grows(manifests: list[Manifest]) -> None:
    grows = {m["spec"]["scaleTargetRef"]["name"]: m["spec"] for m in of_kind(manifests, "HorizontalPodAutoscaler")}
    assert grows.keys() == {"quartet-datasets", "quartet-inference", "quartet-gateway"}
    for m in of_kind(manifests, "Deployment"):
        # A number beside an autoscaler's would be set again at each apply.
        assert ("replicas" in m["spec"]) != (m["metadata"]["name"] in grows)
    for m in of_kind(overlay("gpu"), "Deployment", "HorizontalPodAutoscaler"):
        assert m["spec"].get("replicas", m["spec"].get("minReplicas", 2)) == 2, "one that dies is missed by nobody"


def test_a_wrong_field_of_a_custom_kind_is_found() -> None:
    [route] = of_kind(with_components("gpu", ("gateway-api",)), "GRPCRoute")
    broken = {**route, "spec": {**route["spec"], "parentRef": []}}
    assert len(problems(broken, VERSIONS[-1])) == 1 and problems(route, VERSIONS[-1]) == []


def test_every_service_can_be_drained(manifests: list[Manifest]) -> None:
    served = {m["metadata"]["name"] for m in of_kind(manifests, "Deployment", "StatefulSet")}
    assert {m["metadata"]["name"] for m in of_kind(manifests, "PodDisruptionBudget")} == served
    for m in of_kind(manifests, "Service"):
        if m["metadata"]["name"] != "quartet-gateway":
            assert m["spec"]["clusterIP"] == "None", "gRPC clients must see every replica"


# ---------------------------------------------------------------------------------------------- settings and secrets


def test_services_start_with_what_they_are_told(
    manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every QUARTET_ variable is a setting, and the settings hold together as the service itself checks them."""
    known = {"QUARTET_" + f.name.upper() for f in fields(Settings)}
    for room in ROOMS:
        [container] = [c for name, c, _ in containers(manifests) if name == f"quartet-{room}/{room}"]
        given = variables(container, manifests)
        assert {name for name in given if name.startswith("QUARTET_")} <= known
        with monkeypatch.context() as environment:
            for name, value in given.items():
                environment.setenv(name, value if isinstance(value, str) else "from-a-secret")
            environment.setenv("QUARTET_HOME", str(tmp_path))
            settings = Settings.from_args([], room)
        assert settings.launcher == "kubernetes" and settings.store_uri.startswith("s3://")
        assert settings.blueprint == LAUNCHING.get(room, settings.blueprint)
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        assert ports == {"grpc": settings.port, "metrics": settings.metrics_port}
        mounts = [m["mountPath"] for m in container["volumeMounts"]]
        assert given["QUARTET_HOME"] in mounts and settings.token_file.rpartition("/")[0] in mounts


def test_the_gateway_starts_with_what_it_is_told(
    manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    [container] = [c for name, c, _ in containers(manifests) if name == "quartet-gateway/gateway"]
    given = variables(container, manifests)
    monkeypatch.setenv("QUARTET_TOKEN_FILE", str(tmp_path / "token"))
    (tmp_path / "token").write_text("a secret of sixteen")
    for name in given.keys() - {"QUARTET_TOKEN_FILE"}:
        monkeypatch.setenv(name, given[name])
    told = gateway.read(container["args"])
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert (told.host, ports) == ("0.0.0.0", {"http": told.port, "metrics": told.metrics_port})
    assert given["QUARTET_TOKEN_FILE"].rpartition("/")[0] in [m["mountPath"] for m in container["volumeMounts"]]
    services = {m["metadata"]["name"]: m["spec"]["ports"] for m in of_kind(manifests, "Service")}
    with Client(told.endpoint, told.token_file) as client:
        for room in ROOMS:
            name, _, port = client.address(room).partition(":")
            assert name == f"quartet-{room}" and int(port) in [p["port"] for p in services[name] if p["name"] == "grpc"]


def test_the_engine_is_told_its_address(manifests: list[Manifest]) -> None:
    [container] = [c for name, c, _ in containers(manifests) if name == "quartet-engine/engine"]
    given = variables(container, manifests)
    assert given[HOST_VARIABLE] == {"fieldRef": {"fieldPath": "status.podIP"}}
    ports = {p["name"]: str(p["containerPort"]) for p in container["ports"]}
    assert ports == {"grpc": given[PORT_VARIABLE], "metrics": given[METRICS_VARIABLE]}
    own = {n for n in given if n.startswith("QUARTET_")} - {cache.DIR_VARIABLE, cache.SIZE_VARIABLE}
    assert own == {HOST_VARIABLE, PORT_VARIABLE, METRICS_VARIABLE}


def test_secrets_are_referred_to_and_never_there(manifests: list[Manifest]) -> None:
    assert not of_kind(manifests, "Secret")
    for name, container, spec in containers(manifests):
        assert spec["enableServiceLinks"] is False, f"{name}: a Service could set QUARTET_ variables"
        for variable, value in variables(container, manifests).items():
            secret = variable.startswith("AWS_") or variable == "QUARTET_DATABASE_URL"
            assert isinstance(value, dict) and "secretKeyRef" in value if secret else True, (name, variable)
            assert "PASSWORD" not in variable or variable.endswith("_FILE"), name


# ---------------------------------------------------------------------------------------------- blueprints


def test_blueprints_never_run_by_themselves(manifests: list[Manifest]) -> None:
    found = of_kind(manifests, "CronJob")
    assert {m["metadata"]["name"] for m in found} == set(LAUNCHING.values())
    for m in found:
        assert m["spec"]["suspend"] is True and m["spec"]["schedule"] == "0 0 31 2 *"


def test_a_job_is_one_attempt(manifests: list[Manifest]) -> None:
    for m in of_kind(manifests, "CronJob"):
        job = m["spec"]["jobTemplate"]["spec"]
        assert (job["backoffLimit"], job["parallelism"], job["completions"]) == (0, 1, 1)
        assert job["podReplacementPolicy"] == "Failed" and job["ttlSecondsAfterFinished"] >= 600
        assert job["template"]["spec"]["restartPolicy"] == "Never"
        users, places = job["podFailurePolicy"]["rules"]
        assert users["action"] == "FailJob" and places["action"] == "Ignore"
        assert users["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
        assert users["onExitCodes"]["values"] == list(range(64, 79))
        final = {e.exit_status for e in BY_CODE.values() if not e.retryable and e.code != "CANCELLED"}
        assert final <= set(users["onExitCodes"]["values"])
        assert places["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_a_worker_has_the_grace_that_the_service_gives(manifests: list[Manifest]) -> None:
    [config] = of_kind(manifests, "ConfigMap")
    [worker] = [pod for name, pod in pods(manifests) if name == "quartet-worker"]
    assert float(config["data"]["QUARTET_WORKER_GRACE_S"]) <= worker["spec"]["terminationGracePeriodSeconds"]


def test_gpu_overlay_asks_for_gpus_and_shared_memory() -> None:
    for name, container, spec in containers(overlay("gpu")):
        heavy = name.startswith(("quartet-worker/", "quartet-engine/"))
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == heavy
        if heavy:
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
            [shm] = [v["emptyDir"] for v in spec["volumes"] if v["name"] == "shm"]
            assert shm["medium"] == "Memory" and container["image"].endswith("-cuda")
    assert all("nvidia.com/gpu" not in c["resources"]["limits"] for _, c, _ in containers(overlay("local")))


def test_the_quota_has_room_for_as_many_workers_as_it_has_gpus() -> None:
    """Beside all services at their most; one pod more of each is there while they are replaced."""
    manifests = overlay("gpu")
    [quota] = of_kind(manifests, "ResourceQuota")
    replicas = {
        m["metadata"]["name"]: m["spec"]["maxReplicas"] + 1 for m in of_kind(manifests, "HorizontalPodAutoscaler")
    }
    replicas |= dict.fromkeys(LAUNCHING.values(), int(quota["spec"]["hard"]["requests.nvidia.com/gpu"]))

    def number(amount: str) -> float:
        digits, unit = re.fullmatch(r"(\d+)(m|Mi|Gi|)", amount).groups()  # type: ignore[union-attr]
        return int(digits) * {"m": 0.001, "": 1, "Mi": 2**20, "Gi": 2**30}[unit]

    for what in ("requests.cpu", "requests.memory", "limits.memory"):
        which, _, resource = what.partition(".")
        each = {n.partition("/")[0]: number(c["resources"][which][resource]) for n, c, _ in containers(manifests)}
        most = sum(replicas.get(name, 3) * amount for name, amount in each.items() if name != "quartet-engine")
        assert most <= number(quota["spec"]["hard"][what]), what
        assert each["quartet-engine"] <= each["quartet-worker"]


def test_kueue_gets_suspended_jobs_with_a_queue() -> None:
    jobs = {
        m["metadata"]["name"]: m["spec"]["jobTemplate"] for m in of_kind(with_components("gpu", ("kueue",)), "CronJob")
    }
    assert jobs["quartet-worker"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "quartet"
    assert jobs["quartet-worker"]["spec"]["suspend"] is True
    assert "suspend" not in jobs["quartet-engine"]["spec"]


def test_spot_adds_to_the_tolerations_that_are_there() -> None:
    specs = {name: pod["spec"] for name, pod in pods(with_components("gpu", ("spot",)))}
    assert len(specs["quartet-worker"]["tolerations"]) == 3
    assert {"nodeAffinity", "podAffinity"} == specs["quartet-worker"]["affinity"].keys()
    assert len(specs["quartet-engine"]["tolerations"]) == 1


def test_a_nodes_cache_is_one_claim_that_workers_and_engines_find() -> None:
    manifests = with_components("gpu", ("node-cache",))
    [volume] = of_kind(manifests, "PersistentVolume")
    [claim] = of_kind(manifests, "PersistentVolumeClaim")
    name = claim["metadata"]["name"]
    assert volume["spec"]["claimRef"] == {"namespace": claim["metadata"]["namespace"], "name": name}
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert "local" in volume["spec"] and claim["spec"]["accessModes"] == volume["spec"]["accessModes"]
    for m in of_kind(manifests, "CronJob"):
        pod = m["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        [container] = pod["containers"]
        given = {e["name"]: e.get("value") for e in container["env"]}
        [source] = [v for v in pod["volumes"] if v["name"] == "cache"]
        assert source["persistentVolumeClaim"] == {"claimName": name}
        assert {"name": "cache", "mountPath": given[cache.DIR_VARIABLE]} in container["volumeMounts"]
        assert cache.Cache.from_environment(given)
        # What it is kept to, and an eighth that others may add meanwhile.
        assert float(given[cache.SIZE_VARIABLE]) * 9 / 8 < float(
            volume["spec"]["capacity"]["storage"].removesuffix("Gi")
        )


def test_what_was_compiled_is_the_engines_alone() -> None:
    manifests = with_components("gpu", ("compiled",))
    [claim] = of_kind(manifests, "PersistentVolumeClaim")
    source = {"claimName": claim["metadata"]["name"]}
    mounting = {
        name: pod["spec"]
        for name, pod in pods(manifests)
        if any(v.get("persistentVolumeClaim") == source for v in pod["spec"].get("volumes", ()))
    }
    assert list(mounting) == ["quartet-engine"]
    [container] = mounting["quartet-engine"]["containers"]
    [mount] = [m for m in container["volumeMounts"] if m["name"] == "compiled"]
    given = {e["name"]: e.get("value") for e in container["env"]}
    assert all(given[name].startswith(f"{mount['mountPath']}/") for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"))


def test_the_namespace_refuses_what_is_not_restricted(manifests: list[Manifest]) -> None:
    [namespace] = of_kind(manifests, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for m in manifests:
        whole = m["kind"] in ("Namespace", "PersistentVolume")  # of the cluster
        assert whole or m["metadata"]["namespace"] == "quartet", m["metadata"]
