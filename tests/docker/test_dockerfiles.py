"""What can be told of the images without building them; make test-containers builds and runs them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SERVICES = ("datasets", "training", "conversion", "inference")
LOCKS = {
    **{service: (service, "tracing", "kubernetes") for service in SERVICES},
    "gateway": tuple(re.findall(r"^GATEWAY := (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()),
    "worker-cpu": ("worker", "export", "quantize"),
    "worker-cuda": ("worker", "export", "quantize"),
    "inference-cpu": ("serve", "tracing"),
    "inference-cuda": ("serve", "tracing", "vllm"),
}
NOT_IN_WORKERS = {"grpcio", "grpcio-status"}
Pins = dict[str, list[str]]


def pins(lock: str) -> tuple[Pins, list[str]]:
    """(the versions of each package, the requirements without a hash)."""
    text = (ROOT / "docker" / "locks" / f"{lock}.txt").read_text().replace("\\\n", " ")
    found: Pins = {}
    bare = []
    for line in filter(None, text.splitlines()):
        pin = re.match(r"([\w.-]+)==([^ ;]+)", line)
        assert pin, line
        found.setdefault(canonicalize_name(pin[1]), []).append(pin[2])
        if "--hash=sha256:" not in line:
            bare.append(line)
    return found, bare


def wanted_by(extras: Iterable[str], known: Mapping[str, list[str]]) -> Iterator[str]:
    """What extras ask for, and the extras that they name."""
    for text in (text for extra in extras for text in known[extra]):
        if text.startswith("quartet["):
            yield from wanted_by(Requirement(text).extras, known)
        else:
            yield text


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_loads_nothing_that_its_image_lacks(service: str) -> None:
    """All modules of its room and what they stand on, with every other service's packages out of reach."""
    own = pins(service)[0].keys()
    absent = {
        "numpy",
        "pyarrow",
        "tokenizers",
        "fastokens",
        "jinja2",
        "huggingface-hub",
        "torch",
        "aiohttp",
        "yarl",
    } - own
    names = [name.replace("-", "_") for name in absent]
    code = (
        f"import sys, pkgutil, importlib; sys.modules.update(dict.fromkeys({names!r}))\n"
        f"for room in ('services.common', 'services.common.launchers', 'services.{service}'):\n"
        "    for found in pkgutil.iter_modules(importlib.import_module(room).__path__, room + '.'):\n"
        "        if not found.ispkg:\n"
        "            importlib.import_module(found.name)\n"
        "gone = ('kubernetes.aio', 'kubernetes.client.api.', 'kubernetes.client.models.')\n"
        "assert not [name for name in sys.modules if name.startswith(gone)]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert service != "conversion" or {"numpy", "pyarrow", "tokenizers"} <= absent


def test_an_endpoint_can_be_held_to_its_tokens_in_the_image_of_its_service(tmp_path: Path) -> None:
    """What is loaded only when it is asked for, as `CreateEndpoint` asks; the flow in containers asks for more."""
    tiny_model(tmp_path)
    absent = {name for lock in ("datasets", "worker-cpu") for name in pins(lock)[0]} - pins("inference")[0].keys()
    assert {"numpy", "huggingface-hub", "torch"} <= absent
    code = (
        f"import sys, pathlib; sys.modules.update(dict.fromkeys({[name.replace('-', '_') for name in absent]!r}))\n"
        "from services.finetune.prepare.certificate import certify\n"
        "from services.finetune.templates import load_template\n"
        "from services.finetune.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.from_files(pathlib.Path(sys.argv[1]))\n"
        "certify(tokenizer, load_template('internlm2_chat', tokenizer))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def test_the_gateway_loads_nothing_that_its_image_lacks() -> None:
    """Of what services, workers and the command line have it has what HTTP and gRPC take."""
    own = pins("gateway")[0].keys()
    absent = {name for lock in SERVICES for name in pins(lock)[0]} - own
    assert {"sqlalchemy", "minio", "kubernetes", "numpy", "pyyaml"} <= absent
    names = [name.replace("-", "_") for name in absent] + ["rich", "yaml", "psycopg"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"
        "import services.gateway.__main__, services.gateway.routes, services.client.live, uvicorn\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_hold_what_pyproject_asks_for(lock: str) -> None:
    """Where this fails, pyproject changed: `make locks`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, bare = pins(lock)
    assert bare == []
    for text in [*project["dependencies"], *wanted_by(LOCKS[lock], project["optional-dependencies"])]:
        wanted = Requirement(text)
        if lock.startswith("worker") and wanted.name in NOT_IN_WORKERS:
            continue
        versions = found.get(canonicalize_name(wanted.name), [])
        assert versions and all(wanted.specifier.contains(v) for v in versions), (text, versions)


def test_each_image_has_its_own_stack_only() -> None:
    heavy = {"torch", "transformers", "peft", "bitsandbytes"}
    assert not any(heavy & pins(service)[0].keys() for service in SERVICES)
    for variant in ("cpu", "cuda"):
        worker = pins(f"worker-{variant}")[0].keys()
        assert heavy <= worker and not worker & {*NOT_IN_WORKERS, "sqlalchemy", "kubernetes", "psycopg"}
        assert heavy | {"grpcio"} <= pins(f"inference-{variant}")[0].keys()
    assert pins("worker-cpu")[0]["torch"][0].endswith("+cpu")
    assert not any(name.startswith("nvidia-") for name in pins("worker-cpu")[0])
    assert any(name.startswith("nvidia-") for name in pins("worker-cuda")[0])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.stem)
def test_images_are_built_in_two_steps_from_a_base_that_can_be_chosen(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert sum(line == "FROM ${BASE}" or line.startswith("FROM ${BASE} AS") for line in lines) == 2
    assert not any(line.startswith("# syntax") for line in lines), "it would be fetched at build time"
    last = lines[len(lines) - lines[::-1].index("FROM ${BASE}") :]
    assert "USER 10001:10001" in last and not any("pip" in line for line in last)
    assert not any(re.match(r"(ENV|ARG) .*(TOKEN|SECRET|PASSWORD|KEY)", line) for line in lines)


def test_the_worker_holds_the_library_and_nothing_else() -> None:
    text = (ROOT / "docker" / "worker.Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE)
    locks = ["docker/locks/worker-${VARIANT}.txt", "docker/locks/sbom.txt"]
    assert copied == [*locks, "services/__init__.py", "services/finetune"]


def test_what_the_dockerfiles_copy_is_not_ignored() -> None:
    rules = [r for r in (ROOT / ".dockerignore").read_text().splitlines() if r and not r.startswith("#")]
    assert rules[0] == "*"
    kept = [r[1:] for r in rules if r.startswith("!")]
    for path in DOCKERFILES:
        for source in re.findall(r"^COPY (?!--from)(\S+)", path.read_text(), re.MULTILINE):
            assert any(source == k or source.startswith(k + "/") for k in kept), (path.name, source)
