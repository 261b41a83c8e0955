"""Who may talk to whom, inside the namespace and from outside."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.k8s.rendered import OVERLAYS, ROOMS, Manifest, of_kind, overlay, pods, selects, with_components


def reaches(manifests: Sequence[Manifest], source: dict[str, str], target: dict[str, str]) -> bool:
    """Whether policies let pods with one set of labels open a connection to pods with another."""

    def allowed(way: str, own: dict[str, str], other: dict[str, str]) -> bool:
        rules = [
            peer
            for policy in of_kind(manifests, "NetworkPolicy")
            if selects(policy["spec"]["podSelector"], own)
            for rule in policy["spec"].get(way, ())
            for peer in rule["from" if way == "ingress" else "to"]
        ]
        return any(
            "namespaceSelector" not in p and "podSelector" in p and selects(p["podSelector"], other) for p in rules
        )

    return allowed("egress", source, target) and allowed("ingress", target, source)


def test_everything_is_denied_but_what_must_be(manifests: list[Manifest]) -> None:
    policies = {m["metadata"]["name"]: m["spec"] for m in of_kind(manifests, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    labels = {name.removeprefix("quartet-"): pod["metadata"]["labels"] for name, pod in pods(manifests)}
    open_ways = {(a, b) for a in labels for b in labels if a != b and reaches(manifests, labels[a], labels[b])}
    assert open_ways == {
        *((a, "store") for a in (*ROOMS, "worker", "engine")),
        *((room, "postgres") for room in ROOMS),
        ("inference", "engine"),
        *(("gateway", room) for room in ROOMS),
    }
    assert {name for name in labels if reaches(manifests, labels[name], labels[name])} == {"worker"}


def test_workers_and_engines_reach_no_address_by_default() -> None:
    for name in OVERLAYS:
        labels = {n: pod["metadata"]["labels"] for n, pod in pods(overlay(name))}
        for policy in of_kind(overlay(name), "NetworkPolicy"):
            by_address = any("ipBlock" in to for rule in policy["spec"].get("egress", ()) for to in rule["to"])
            for pod in ("quartet-worker", "quartet-engine"):
                assert not (by_address and selects(policy["spec"]["podSelector"], labels[pod])), policy["metadata"]


def test_no_way_leads_to_the_metadata_of_a_cloud(manifests: list[Manifest]) -> None:
    for policy in of_kind(manifests, "NetworkPolicy"):
        for rule in policy["spec"].get("egress", ()):
            for to in rule["to"]:
                assert "169.254.0.0/16" in to.get("ipBlock", {"except": ["169.254.0.0/16"]})["except"]


# ---------------------------------------------------------------------------------------------- from outside


def test_one_address_leads_to_every_service() -> None:
    manifests = with_components("gpu", ("gateway-api",))
    [route] = of_kind(manifests, "GRPCRoute")
    led = {
        rule["matches"][0]["method"]["service"]: (rule["backendRefs"][0]["name"], rule["backendRefs"][0]["port"])
        for rule in route["spec"]["rules"]
    }
    services = {m["metadata"]["name"]: m["spec"] for m in of_kind(manifests, "Service")}
    assert led.keys() == {f"quartet.{room}.v1.{room.capitalize()}" for room in ROOMS}
    for service, (name, port) in led.items():
        assert name == f"quartet-{service.split('.')[1]}"
        assert port in [p["port"] for p in services[name]["ports"] if p["name"] == "grpc"]


@pytest.mark.parametrize("component", ["gateway-api", "ingress"])
def test_the_gateway_can_be_reached_from_outside(component: str) -> None:
    manifests = with_components("gpu", (component,))
    if component == "ingress":
        [ingress] = of_kind(manifests, "Ingress")
        [rule] = ingress["spec"]["rules"]
        assert [rule["host"]] == ingress["spec"]["tls"][0]["hosts"], "it would be served in the clear"
        backend = rule["http"]["paths"][0]["backend"]["service"]
        led = backend["name"], backend["port"]["name"]
    else:
        [route], [other] = of_kind(manifests, "HTTPRoute"), of_kind(manifests, "GRPCRoute")
        assert route["spec"]["parentRefs"] != other["spec"]["parentRefs"], "one of the two would be refused"
        [backend] = route["spec"]["rules"][0]["backendRefs"]
        led = backend["name"], backend["port"]
    [service] = [m for m in of_kind(manifests, "Service") if m["metadata"]["name"] == "quartet-gateway"]
    [port] = service["spec"]["ports"]
    assert led in [("quartet-gateway", port["name"]), ("quartet-gateway", port["port"])]
    assert "clusterIP" not in service["spec"]


def test_prometheus_finds_and_reaches_what_it_is_to_read() -> None:
    manifests = with_components("gpu", ("monitoring",))
    [monitor] = of_kind(manifests, "ServiceMonitor")
    found = [
        m
        for m in of_kind(manifests, "Service")
        if selects(monitor["spec"]["selector"], m["metadata"].get("labels", {}))
    ]
    assert {m["metadata"]["name"] for m in found} == {f"quartet-{room}" for room in ROOMS}
    [endpoint] = monitor["spec"]["endpoints"]
    assert all(endpoint["port"] in [p["name"] for p in m["spec"]["ports"]] for m in found)
    [policy] = [m for m in of_kind(manifests, "NetworkPolicy") if m["metadata"]["name"] == "monitoring"]
    assert policy["spec"]["ingress"][0]["ports"] == [{"port": "metrics"}]
    [answers] = of_kind(manifests, "PodMonitor")
    [blueprint] = [m for m in of_kind(manifests, "CronJob") if m["metadata"]["name"] == "quartet-engine"]
    [gateway] = [m for m in of_kind(manifests, "Deployment") if m["metadata"]["name"] == "quartet-gateway"]
    pods = [blueprint["spec"]["jobTemplate"]["spec"]["template"], gateway["spec"]["template"]]
    for pod in pods:
        assert selects(answers["spec"]["selector"], pod["metadata"]["labels"])
        assert selects(policy["spec"]["podSelector"], pod["metadata"]["labels"])
        [container] = pod["spec"]["containers"]
        assert {"name": "metrics", "containerPort": 9090} in container["ports"]
        told = [e.get("value") for e in container["env"] if e["name"] == "QUARTET_ENGINE_METRICS_PORT"]
        assert told == ["9090"] or "--metrics-port=9090" in container["args"]
    # Without the component nobody reaches that port.
    for policy in of_kind(overlay("gpu"), "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            if selects(policy["spec"]["podSelector"], {"app.kubernetes.io/component": "service"}):
                assert rule["ports"] == [{"port": "grpc"}]


def test_whoever_makes_spans_reaches_the_collector() -> None:
    manifests = with_components("gpu", ("tracing",))
    [policy] = [m["spec"] for m in of_kind(manifests, "NetworkPolicy") if m["metadata"]["name"] == "to-collector"]
    [way] = policy["egress"]
    assert way["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "observability"}}}]
    makes = {f"quartet-{name}" for name in (*ROOMS, "gateway", "engine")}
    for name, pod in pods(manifests):
        told = [e["value"] for c in pod["spec"]["containers"] for e in c["env"] if e["name"].startswith("OTEL_")]
        assert told == [f"http://otel-collector.observability:{port['port']}" for port in way["ports"] if name in makes]
        assert selects(policy["podSelector"], pod["metadata"]["labels"]) == (name in makes)
