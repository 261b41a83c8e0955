"""What `kubectl kustomize` makes of k8s/, and the Kubernetes API's own schemas to hold it against."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft7Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = sorted(p.name for p in (K8S / "overlays").iterdir())
COMPONENTS = sorted(p.name for p in (K8S / "components").iterdir())
SCHEMAS = Path(kubernetes_validate.__file__).with_name("kubernetes-json-schema")
VERSIONS = [f"1.{minor}" for minor in range(31, 38)]

Manifest = dict[str, Any]


ROOMS = ("conversion", "datasets", "inference", "training")
# What a site may put together; each must be as good as the overlays.
SETS: dict[str, tuple[str, Sequence[str]]] = {
    **{name: (name, ()) for name in OVERLAYS},
    **{f"gpu+{c}": ("gpu", (c,)) for c in COMPONENTS if c not in ("postgres", "seaweedfs", "quota")},
    "gpu+all": ("gpu", tuple(c for c in COMPONENTS if c not in ("postgres", "seaweedfs", "quota"))),
    "local+quota": ("local", ("quota",)),
}


def kustomize(folder: Path) -> list[Manifest]:
    command = [str(Path(sys.executable).with_name("kubectl")), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def overlay(name: str) -> list[Manifest]:
    return kustomize(K8S / "overlays" / name)


@functools.cache
def with_components(overlay_name: str, components: Sequence[str]) -> list[Manifest]:
    """An overlay as a site would extend it by a kustomization of its own."""
    with tempfile.TemporaryDirectory() as folder:
        # Kustomize takes relative paths only, and resolves links first.
        up = os.path.relpath(K8S, Path(folder).resolve())
        kustomization = {
            "resources": [f"{up}/overlays/{overlay_name}"],
            "components": [f"{up}/components/{name}" for name in components],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomize(Path(folder))


def _strict(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An object that has these fields and no others."""
    properties = {**required, **(optional or {})}
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


_TEXT = {"type": "string", "minLength": 1}
_META = {"apiVersion": _TEXT, "kind": _TEXT, "metadata": {"type": "object", "required": ["name", "namespace"]}}
_PARENTS = _list(_strict({"name": _TEXT}, {"namespace": _TEXT, "sectionName": _TEXT}))
_BACKENDS = _list(_strict({"name": _TEXT, "port": {"type": "integer"}}))
# Not of Kubernetes itself: the fields of the Gateway API v1 and of Prometheus' operator that k8s/ uses, as strict as theirs.
CUSTOM = {
    "gateway.networking.k8s.io/v1/GRPCRoute": _strict(
        {
            **_META,
            "spec": _strict(
                {
                    "parentRefs": _PARENTS,
                    "rules": _list(
                        _strict(
                            {
                                "matches": _list(
                                    _strict({"method": _strict({"type": {"enum": ["Exact"]}, "service": _TEXT})})
                                ),
                                "backendRefs": _BACKENDS,
                            }
                        )
                    ),
                },
                {"hostnames": _list(_TEXT)},
            ),
        }
    ),
    "gateway.networking.k8s.io/v1/HTTPRoute": _strict(
        {
            **_META,
            "spec": _strict(
                {
                    "parentRefs": _PARENTS,
                    "rules": _list(
                        _strict(
                            {
                                "matches": _list(
                                    _strict({"path": _strict({"type": {"enum": ["PathPrefix"]}, "value": _TEXT})})
                                ),
                                "backendRefs": _BACKENDS,
                            },
                            {"timeouts": _strict({"request": {"pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}})},
                        )
                    ),
                },
                {"hostnames": _list(_TEXT)},
            ),
        }
    ),
    "monitoring.coreos.com/v1/PodMonitor": _strict(
        {
            **_META,
            "spec": _strict(
                {
                    "selector": _strict({"matchExpressions": {"type": "array"}}),
                    "podMetricsEndpoints": _list(_strict({"port": _TEXT, "interval": {"pattern": "^[0-9]+s$"}})),
                }
            ),
        }
    ),
    "monitoring.coreos.com/v1/ServiceMonitor": _strict(
        {
            **_META,
            "spec": _strict(
                {
                    "selector": _strict({"matchExpressions": {"type": "array"}}),
                    "endpoints": _list(_strict({"port": _TEXT, "interval": {"pattern": "^[0-9]+s$"}})),
                }
            ),
        }
    ),
}


@functools.cache
def _definitions(version: str) -> Registry[Any]:
    folder = SCHEMAS / f"v{version}.0-local-strict"
    text = json.loads((folder / "_definitions.json").read_text())
    registry: Registry[Any] = Registry().with_resource("_definitions.json", Resource.from_contents(text, DRAFT7))
    return registry.crawl()


@functools.cache
def _validator(kind: str, api_version: str, version: str) -> Draft7Validator:
    if f"{api_version}/{kind}" in CUSTOM:
        return Draft7Validator(CUSTOM[f"{api_version}/{kind}"])
    group, _, api = api_version.rpartition("/")
    parts = [kind.lower(), *([group.split(".")[0]] if group else []), api]
    path = SCHEMAS / f"v{version}.0-local-strict" / f"{'-'.join(parts)}.json"
    schema = json.loads(path.read_text())
    return Draft7Validator(schema, registry=_definitions(version))


def problems(manifest: Manifest, version: str) -> list[str]:
    """Every way in which an object breaks the strict schema of a Kubernetes version."""
    return list(_problems(json.dumps(manifest), version))


@functools.cache
def _problems(text: str, version: str) -> Sequence[str]:
    manifest = json.loads(text)
    validator = _validator(manifest["kind"], manifest["apiVersion"], version)
    name = manifest["metadata"].get("name")
    return [f"{manifest['kind']}/{name} {e.json_path}: {e.message}" for e in validator.iter_errors(manifest)]


def of_kind(manifests: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    return [m for m in manifests if m["kind"] in kinds]


def pods(manifests: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(name, pod template) of everything that makes pods."""
    for m in of_kind(manifests, "Deployment", "StatefulSet", "DaemonSet", "Job"):
        yield m["metadata"]["name"], m["spec"]["template"]
    for m in of_kind(manifests, "CronJob"):
        yield m["metadata"]["name"], m["spec"]["jobTemplate"]["spec"]["template"]


def containers(manifests: Sequence[Manifest]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, container, pod spec)."""
    for name, pod in pods(manifests):
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())]:
            yield f"{name}/{container['name']}", container, pod["spec"]


def variables(container: dict[str, Any], manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Name -> value, or where it comes from."""
    found: dict[str, Any] = {}
    for source in container.get("envFrom", ()):
        [config] = [
            m for m in of_kind(manifests, "ConfigMap") if m["metadata"]["name"] == source["configMapRef"]["name"]
        ]
        found.update(config["data"])
    found.update({e["name"]: e.get("value", e.get("valueFrom")) for e in container.get("env", ())})
    return found


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items()
    among = selector.get("matchExpressions", ())
    assert all(e["operator"] == "In" for e in among)
    return all(labels.get(k) == v for k, v in wanted) and all(labels.get(e["key"]) in e["values"] for e in among)
