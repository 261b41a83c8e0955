"""publish: a folder with a web page on which one model answers, to run or to deploy elsewhere."""

from __future__ import annotations

import json
from argparse import Namespace
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from quartet.conversion.v1 import conversion_pb2
from quartet.inference.v1 import inference_pb2

from services.client.client import Client
from services.client.commands import connect
from services.client.download import download_model
from services.client.show import bar, out, plain
from services.finetune.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

WHOLE = (conversion_pb2.Model.BASE, conversion_pb2.Model.MERGED, conversion_pb2.Model.QUANTIZED)
GRADIO = "gradio>=6.31,<7"
REQUIREMENTS = {
    "model": (
        GRADIO,
        "torch>=2.11,<2.14",
        "transformers>=5.16.1,<5.20",
        "accelerate>=1.15,<2",
        "safetensors>=0.7,<0.9",
    ),
    "url": (GRADIO, "openai>=3,<4"),
}
DEMO = "demo.json"
READERS = {"bitsandbytes": "bitsandbytes>=0.50,<0.51", "compressed-tensors": "compressed-tensors>=0.17,<0.21"}
"""What else reads weights of a quantisation method."""


def publish(a: Namespace) -> None:
    """With --url a page that asks an endpoint over OpenAI's API, else one that loads the model itself."""
    folder = Path(a.directory)
    with connect(a) as client:
        written = _asking(client, a, folder) if a.url else _loading(client, a, folder)
    if a.json:
        out({"directory": str(folder), "files": written})
    else:
        print(f"the page is in {folder}: pip install -r {folder}/requirements.txt && python {folder}/app.py")


def _asking(client: Client, a: Namespace, folder: Path) -> list[str]:
    """NotFound (ENDPOINT_NOT_FOUND), InvalidArgument (URL_INVALID)."""
    if not a.url.startswith(("http://", "https://")):
        raise InvalidArgument(
            f"--url {a.url} is no http:// or https:// address, as http://host:8000/v1", reason="URL_INVALID"
        )
    endpoint, _, alias = a.target.partition(":")
    served = client.inference.ListServedModels(inference_pb2.ListServedModelsRequest(parent=client.parent)).models
    if not any((s.endpoint, s.adapter) == (client.name("endpoints", endpoint), alias) for s in served):
        raise NotFound(
            f"{a.target} is not served; --url wants an endpoint, or endpoint:alias: quartet endpoint list",
            reason="ENDPOINT_NOT_FOUND",
        )
    demo = {**_demo(a, {}), "model": a.target, "url": a.url}
    _begin(folder, demo)
    return _write(folder, "url", demo, {"name": a.target, "url": a.url}, REQUIREMENTS["url"])


def _loading(client: Client, a: Namespace, folder: Path) -> list[str]:
    """NotFound (MODEL_NOT_FOUND), FailedPrecondition (MODEL_NOT_SERVABLE, TEMPLATE_MISSING)."""
    model = client.model(a.target)
    if model.kind == conversion_pb2.Model.ADAPTER:
        base = model.base_model.rpartition("/")[2] or "BASE"
        why = f"{model.name} is an adapter: quartet convert merge {base} {a.target} NAME, and publish NAME"
        raise FailedPrecondition(why, reason="MODEL_NOT_SERVABLE")
    if model.kind not in WHOLE:
        raise FailedPrecondition(
            f"{model.name} is an export, which transformers does not load", reason="MODEL_NOT_SERVABLE"
        )
    if not model.template:
        raise FailedPrecondition(f"{model.name} has no chat template, so it cannot chat", reason="TEMPLATE_MISSING")
    about = plain(model)
    demo = _demo(a, about.get("generation", {}), model.system)
    memory = f"{sum(f.size_bytes for f in model.files if f.path.endswith('.safetensors')) * 1.2 / 1e9:.1f} GB"
    _begin(folder, demo)
    with bar("downloading", a.json) as told:
        download_model(client, model, folder / "model", told)
    written = _write(folder, "model", demo, {"name": model.name, "memory": memory}, _requirements(folder / "model"))
    (folder / "packages.txt").write_text("git\ngit-lfs\n", "utf-8")
    return [*written, "packages.txt", "model/"]


def _requirements(model: Path) -> tuple[str, ...]:
    config: dict[str, Any] = json.loads((model / "config.json").read_text("utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method", "")
    return (*REQUIREMENTS["model"], *([READERS[method]] if method in READERS else []))


def _demo(a: Namespace, own: dict[str, Any], system: str = "") -> dict[str, Any]:
    """What the page begins with: the model's own ways."""
    ends = own.get("eos_token_id")
    return {
        "title": a.title or a.target.rpartition("/")[2],
        "system": a.system or system,
        "temperature": own.get("temperature", 1.0) if own.get("do_sample") else 0.0,
        "top_p": own.get("top_p") or 1.0,
        "generation": {"eos_token_id": ends} if ends else {},
    }


def _begin(folder: Path, demo: dict[str, Any]) -> None:
    """Make the folder, or go on in one that this command made. AlreadyExists (FILE_EXISTS) for one with other files."""
    if folder.exists() and any(folder.iterdir()) and not (folder / DEMO).exists():
        raise AlreadyExists(f"{folder} holds other files; choose a folder", reason="FILE_EXISTS")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DEMO).write_text(json.dumps(demo, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _write(
    folder: Path, kind: str, demo: dict[str, Any], words: dict[str, str], requirements: tuple[str, ...]
) -> list[str]:
    source = resources.files("services.client") / "demo"
    texts = {
        "app.py": (source / f"{kind}.py.in").read_text("utf-8"),
        "requirements.txt": "\n".join(requirements) + "\n",
        "README.md": Template((source / f"{kind}.md.in").read_text("utf-8")).substitute(title=demo["title"], **words),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    return [DEMO, *texts]
