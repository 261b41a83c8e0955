"""What a run leaves: each step once whatever the attempts, curves of them, and what trackers are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from PIL import Image
from transformers import LlamaConfig

from services.finetune.errors import DataLoss, FailedPrecondition, InvalidArgument
from services.finetune.packing import order as order_of
from services.finetune.progress import Attempt, raise_fence
from services.finetune.store import Store
from services.finetune.store.artifacts import load
from services.finetune.train import flops
from services.finetune.train.curves import draw_losses, write_tensorboard
from services.finetune.train.report import Report
from services.finetune.train.steplog import NAME, Difference, first_difference, read_log
from tests.finetune.train.running import lines, order, report, run, told
from tests.finetune.train.test_fused import adapted
from tests.finetune.train.test_model import SMALL


def test_the_step_log_says_what_was_read_and_its_report_what_was_told(file_store: Store, tmp_path: Path) -> None:
    what = order(file_store, tmp_path, validation__ratio=0.2, report__prompts=["say 3"], report__sample_every=4)
    result = run(file_store, what, tmp_path, "jobs/a")
    files = report(file_store, "jobs/a", tmp_path)
    metrics = [e for e in told(file_store, "jobs/a", "metric") if "loss" in e["values"]]
    steps = read_log(files / NAME)
    assert [(s["step"], s["loss"], s["lr"], s["grad_norm"]) for s in steps] == [
        (e["step"], *(e["values"][name] for name in ("loss", "lr", "grad_norm"))) for e in metrics
    ]
    (info,) = told(file_store, "jobs/a", "dataset")
    per_epoch = info["blocks"] // 2 + info["blocks"] % 2
    read = [block for s in steps[:per_epoch] for block in s["blocks"]]
    assert read == order_of(info["blocks"], 0, 0).tolist()
    assert sum(s["learned"] for s in steps[:per_epoch]) == info["learned"]
    assert sum(s["tokens"] for s in steps[:per_epoch]) == info["tokens"]
    assert (info["rows"], info["validation_samples"], info["samples"]) == (48, 10, 38)
    # The same log goes with the checkpoint.
    kept = load(file_store, result["checkpoint"])
    assert kept.file(NAME).digest == next(f.digest for f in _manifest(file_store, "jobs/a").files if f.path == NAME)
    assert [e["step"] for e in lines(files / "samples.jsonl")] == sorted({*range(4, len(steps), 4), len(steps)})
    assert lines(files / "metrics.jsonl.gz")[0]["values"] == metrics[0]["values"]
    assert metrics[0]["values"]["peak_memory_bytes"] > 2**26 and "mfu" not in metrics[0]["values"]
    assert "attempt 1 INFO" in (files / "logs/rank-0.txt").read_text()
    with Image.open(files / "loss.png") as picture:
        assert picture.size == (1080, 672)
    assert json.loads((files / "summary.json").read_text())["step"] == len(steps)


def _manifest(store: Store, key: str, attempt: int = 1) -> Any:
    return load(store, told(store, key, "report", attempt)[-1]["digest"])


def test_a_second_attempt_goes_on_with_the_log_and_compares_what_it_takes_again(
    file_store: Store, tmp_path: Path
) -> None:
    what = order(file_store, tmp_path, report__prompts=["say 3"], report__sample_every=2)
    whole = run(file_store, what, tmp_path, "jobs/whole")

    def lost(*_: Any) -> None:
        raise RuntimeError("the machine is gone")

    # Lost after step 5, when step 3 was saved.
    with pytest.MonkeyPatch.context() as patch:
        real = Report.metric

        def metric(self: Report, step: int, values: Any) -> None:
            real(self, step, values)
            if step == 5:
                lost()

        patch.setattr(Report, "metric", metric)
        patch.setattr(Report, "close", lambda *_: None)
        with pytest.raises(RuntimeError):
            run(file_store, what, tmp_path, "jobs/cut")
    again = run(file_store, what, tmp_path, "jobs/cut", 2)
    assert again["checkpoint"] == whole["checkpoint"], "every byte of it, the step log too"
    ours, theirs = (report(file_store, key, tmp_path, n) for key, n in (("jobs/cut", 2), ("jobs/whole", 1)))
    assert (ours / NAME).read_bytes() == (theirs / NAME).read_bytes()
    seen, wanted = ([(e["step"], e["values"]["loss"]) for e in lines(p / "metrics.jsonl.gz")] for p in (ours, theirs))
    assert seen == wanted
    answers, wanted = ([(e["step"], e["answer"]) for e in lines(p / "samples.jsonl")] for p in (ours, theirs))
    assert answers == wanted
    summary = json.loads((ours / "summary.json").read_text())
    assert (summary["replayed_steps"], summary["first_difference"], summary["attempt"]) == (2, None, 2)
    logs = (ours / "logs/rank-0.txt").read_text()
    assert "attempt 1 " in logs and "going on after step 3" in logs


def test_the_first_step_that_differs_is_named(file_store: Store, tmp_path: Path) -> None:
    what = order(file_store, tmp_path)
    run(file_store, what, tmp_path, "jobs/a")
    steps = read_log(report(file_store, "jobs/a", tmp_path) / NAME)
    assert first_difference(steps, steps) is None
    other = [dict(step) for step in steps]
    other[4]["loss"] = np.nextafter(other[4]["loss"], 9.0)
    assert first_difference(steps, other) == Difference(5, "loss", steps[4]["loss"], other[4]["loss"])
    assert first_difference(steps[:3], steps) == Difference(4, "step", None, 4)
    (tmp_path / "torn").write_bytes(b"\x1f\x8b\x08torn")
    with pytest.raises(DataLoss):
        read_log(tmp_path / "torn")
    # An attempt that took step 4 and 5 otherwise, as a GPU may.
    raise_fence(file_store, "jobs/b", 1)
    before = Attempt(file_store, "jobs/b", 1)
    checkpoint = next(e for e in told(file_store, "jobs/a", "checkpoint") if e["step"] == 3)
    with before:
        before.checkpoint(3, checkpoint["digest"], checkpoint["loss"], report=checkpoint["report"])
        for step in other[3:5]:
            values = {name: step[name] for name in ("loss", "lr", "grad_norm")}
            before.emit("metric", step=step["step"], values=values)
    run(file_store, what, tmp_path, "jobs/b", 2)
    summary = json.loads((report(file_store, "jobs/b", tmp_path, 2) / "summary.json").read_text())
    assert summary["replayed_steps"] == 2 and summary["first_difference"]["step"] == 5
    warnings = [e["text"] for e in told(file_store, "jobs/b", "log", 2) if e["level"] == "warning"]
    assert len(warnings) == 1 and warnings[0].startswith("step 5: loss ")


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(
    file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.finetune.train.engine import Autograd

    real, calls = Autograd.backprop, iter(range(100))

    def backprop(self: Autograd, *given: Any) -> torch.Tensor:
        loss = real(self, *given)
        return loss * float("nan") if next(calls) == 9 else loss  # in step 5

    monkeypatch.setattr(Autograd, "backprop", backprop)
    with pytest.raises(InvalidArgument, match=r"at step 5.*last good checkpoint is of step 3") as caught:
        run(file_store, order(file_store, tmp_path), tmp_path, "jobs/nan")
    assert caught.value.reason == "LOSS_NOT_FINITE"
    assert caught.value.metadata == {"step": "5", "checkpoint_step": "3"}
    files = report(file_store, "jobs/nan", tmp_path)
    assert len(read_log(files / NAME)) == 4
    assert json.loads((files / "summary.json").read_text())["state"] == "FAILED"


def test_curves_of_any_length_are_drawn(tmp_path: Path) -> None:
    for count in (1, 20, 21, 5000):
        losses = [(step, 3.0 / step) for step in range(1, count + 1)]
        draw_losses(tmp_path / f"{count}.png", "a job", losses, losses[:: max(1, count // 5)], losses)
        with Image.open(tmp_path / f"{count}.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        # Blue is the training loss, red the validation loss; 5000 points are no wider than the picture.
        assert (np.abs(pixels.astype(int) - (0x1F, 0x5F, 0xA8)).sum(1) < 30).any()
        assert (np.abs(pixels.astype(int) - (0xC2, 0x41, 0x0C)).sum(1) < 30).any()


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    """By the record format: length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    metrics = [{"time": 10.0 * n, "step": n, "values": {"loss": 1.0 / n, "validation_loss": 2.0 / n}} for n in (1, 2)]
    samples = [{"time": 30.0, "step": 2, "prompt": "who?", "answer": "me"}]
    for _ in range(2):  # the second time in place of the first
        write_tensorboard(tmp_path / "tb", metrics, samples)
    (file,) = (tmp_path / "tb").iterdir()
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        try:
            event = Event.FromString(data[at + 12 : at + 12 + size])
        except DecodeError as error:
            raise AssertionError("no event") from error
        found += [(event.wall_time, event.step, v.tag, round(v.simple_value, 6)) for v in event.summary.value]
        at += 16 + size
    assert found[:4] == [
        (10.0, 1, "train/loss", 1.0),
        (10.0, 1, "validation/loss", 2.0),
        (20.0, 2, "train/loss", 0.5),
        (20.0, 2, "validation/loss", 1.0),
    ]
    assert found[4][:2] == (30.0, 2) and found[4][2].startswith("sample")


def test_flops_are_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """hidden 32, 2 layers, 4 heads over 2, LoRA of rank 4 on every linear layer."""
    model = adapted(LlamaConfig(**SMALL))
    config = model.get_base_model().config
    d, i, v, layers = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    kv = d * config.num_key_value_heads // config.num_attention_heads
    frozen = layers * (2 * d * d + 2 * d * kv + 3 * d * i)
    trained = layers * 4 * (2 * (d + d) + 2 * (d + kv) + 3 * (d + i))
    found = flops.cost(model)
    assert found == flops.Cost(frozen, trained, 4 * d * v, 6 * layers * d)
    assert found.flops(10, 3, 58) == 10 * (4 * frozen + 6 * trained) + 3 * 4 * d * v + 58 * 6 * layers * d
    gpu = torch.device("cuda")
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("Some GPU of tomorrow", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert flops.peak(gpu, torch.bfloat16) == peak
    assert flops.peak(gpu, torch.float32) is None and flops.peak(torch.device("cpu"), torch.bfloat16) is None


def test_a_tracker_that_is_not_there_is_named(
    file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    what = order(file_store, tmp_path, report__trackers=["wandb"])
    with pytest.raises(FailedPrecondition, match="pip install wandb") as caught:
        run(file_store, what, tmp_path, "jobs/t")
    assert caught.value.reason == "TRACKER_MISSING"


@pytest.mark.filterwarnings("default")
def test_mlflow_without_a_server_keeps_the_run_in_the_report(
    file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    what = order(file_store, tmp_path, report__trackers=["mlflow"])
    run(file_store, what, tmp_path, "jobs/t")
    files = report(file_store, "jobs/t", tmp_path)
    assert not [e for e in told(file_store, "jobs/t", "log") if e["level"] == "warning"]
    losses = [e["values"]["loss"] for e in told(file_store, "jobs/t", "metric")]
    (kept,) = (files / "mlflow").glob("*/*/metrics/loss")
    assert [float(line.split()[1]) for line in kept.read_text().splitlines()] == losses
    assert (kept.parent.parent / "params/optim.lr").read_text() == "0.02"


@pytest.mark.filterwarnings("default")
def test_wandb_without_a_key_keeps_the_run_in_the_report(
    file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    what = order(file_store, tmp_path, report__trackers=["wandb"])
    run(file_store, what, tmp_path, "jobs/t")
    assert not [e for e in told(file_store, "jobs/t", "log") if e["level"] == "warning"]
    kept = list((report(file_store, "jobs/t", tmp_path) / "wandb").rglob("run-*.wandb"))
    assert len(kept) == 1 and b"grad_norm" in kept[0].read_bytes()


def test_what_a_tracker_fails_at_ends_nothing(
    file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.finetune.train import trackers

    class Broken:
        def __init__(self, *_: Any) -> None:
            pass

        def log(self, step: int, values: Any) -> None:
            raise OSError("no route to host")

        def close(self, succeeded: bool) -> None:
            raise AssertionError("it was left out")

    monkeypatch.setattr(trackers, "_Wandb", Broken)
    run(file_store, order(file_store, tmp_path, report__trackers=["wandb"]), tmp_path, "jobs/t")
    warnings = [e["text"] for e in told(file_store, "jobs/t", "log") if e["level"] == "warning"]
    assert warnings == ["wandb is left out from here: no route to host"]
