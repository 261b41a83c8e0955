"""Each optimizer goes on bit for bit from what a checkpoint holds of it, and each schedule is transformers' own."""

from __future__ import annotations

import functools
import itertools
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler, get_wsd_schedule

from services.finetune.config import Optimizer, RunConfig, ScheduleConfig, override
from services.finetune.errors import FailedPrecondition
from services.finetune.train import checkpoint
from services.finetune.train.optim import choose_optimizer, make_optimizer, rate, state_bytes
from tests.finetune.train.conftest import Bench

CPU = torch.device("cpu")


class Small(torch.nn.Module):
    """Weights large enough for eight bits, small ones, an embedding, and names of LoRA."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(70, 64)
        self.linear = torch.nn.Linear(64, 80)
        self.norm = torch.nn.LayerNorm(64)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(64, 4, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 64, bias=False)})


def config_of(name: str, **more: Any) -> RunConfig:
    plain = {"optim.name": name, "optim.lr": 1e-2, "optim.weight_decay": 0.1, "optim.momentum": 0.5}
    return override(RunConfig(), {**plain, "lora.loraplus_lr_ratio": 4.0, **more})


def made(config: RunConfig) -> tuple[Mapping[str, torch.Tensor], torch.optim.Optimizer]:
    model = torch.nn.ModuleDict({"a": Small()})
    parameters = dict(sorted(model.named_parameters()))
    return parameters, make_optimizer(config, model, parameters)[0]


def step(parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, number: int) -> None:
    draw = torch.Generator().manual_seed(number)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    optimizer.step()


@pytest.mark.parametrize("name", typing.get_args(Optimizer))
def test_it_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    parameters, optimizer = made(config_of(name))
    for number in range(3):
        step(parameters, optimizer, number)
    with checkpoint._Copies() as copies:
        tensors, numbers = checkpoint._split(optimizer, parameters, copies)
    checkpoint.write_sharded(tensors, tmp_path, "optimizer", limit=9000)
    split = sum(t.nbytes for t in tensors.values()) > 9000
    assert len(list(tmp_path.glob("optimizer-*-of-*.safetensors"))) > 1 or not split
    again, resumed = made(config_of(name))
    for key, parameter in parameters.items():
        again[key].data.copy_(parameter.data)
    kept = json.loads(json.dumps(numbers))
    whole = checkpoint._by_parameter({**checkpoint.read_sharded(tmp_path, "optimizer"), **kept})
    checkpoint._join(resumed, again, whole)
    for number in range(3, 6):
        step(parameters, optimizer, number)
        step(again, resumed, number)
    assert all(torch.equal(parameters[key], again[key]) for key in parameters)
    if "8bit" in name:
        assert {t.dtype for key, t in tensors.items() if key.endswith("|state1")} == {torch.uint8, torch.float32}


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adafactor"])
def test_a_run_goes_on_bit_for_bit(bench: Bench, name: str) -> None:
    # Of rank 64, some weights are large enough for eight bits.
    way: dict[str, Any] = {"optim__name": name, "lora__rank": 64}
    ran = bench.train(**way)
    resumed = bench.train(resume=ran.checkpoints[2], **way)
    assert ran.losses[-1] < ran.losses[0] and bench.files(resumed.last) == bench.files(ran.last)
    honest = "optimizer adamw_8bit in place of paged_adamw_8bit: without a GPU there is nothing to page"
    assert ran.said(honest if "paged" in name else "optimizer adafactor")


def test_another_kind_of_state_is_refused() -> None:
    parameters, optimizer = made(config_of("adamw"))
    step(parameters, optimizer, 0)
    with checkpoint._Copies() as copies:
        tensors, numbers = checkpoint._split(optimizer, parameters, copies)
    others, eight = made(config_of("adamw_8bit"))
    with pytest.raises(FailedPrecondition) as caught:
        checkpoint._join(eight, others, checkpoint._by_parameter({**tensors, **numbers}))
    assert caught.value.reason == "RESUME_MISMATCH"


def test_paging_needs_a_gpu_and_nothing_else_does() -> None:
    for name in typing.get_args(Optimizer):
        runs, told = choose_optimizer(name, CPU)
        assert runs == name.removeprefix("paged_").replace("_32bit", "") and (name in told)
        assert choose_optimizer(name, torch.device("cuda"))[0] == name


def test_matrices_decay_and_b_learns_faster() -> None:
    parameters, optimizer = made(config_of("adamw"))
    names = {id(p): name.removeprefix("a.") for name, p in parameters.items()}
    found = {
        names[id(p)]: (g["weight_decay"], g["peak_lr"], g["lr"]) for g in optimizer.param_groups for p in g["params"]
    }
    assert found["linear.weight"] == found["lora_A.default.weight"] == (0.1, 1e-2, 1e-2)
    assert found["lora_B.default.weight"] == (0.1, 4e-2, 4e-2)
    assert found["embedding.weight"] == found["linear.bias"] == found["norm.weight"] == (0.0, 1e-2, 1e-2)


def test_what_its_state_takes_is_reckoned_before_it_is_there() -> None:
    parameters, optimizer = made(config_of("adamw"))
    expected = state_bytes(optimizer)
    assert expected == 8 * sum(p.numel() for p in parameters.values())
    assert 4 * state_bytes(made(config_of("adamw_8bit"))[1]) == expected
    step(parameters, optimizer, 0)
    assert state_bytes(optimizer) == 0


WARM, TOTAL = 7, 60
FLOOR = {"min_lr_rate": 0.2}
THEIRS: dict[str, Any] = {
    "cosine": functools.partial(get_scheduler, "cosine_with_min_lr", scheduler_specific_kwargs=FLOOR),
    "linear": functools.partial(get_scheduler, "linear"),
    "constant": functools.partial(get_scheduler, "constant"),
    "constant_with_warmup": functools.partial(get_scheduler, "constant_with_warmup"),
    "polynomial": functools.partial(
        get_scheduler, "polynomial", scheduler_specific_kwargs={"power": 2.0, "lr_end": 0.2}
    ),
    "wsd": functools.partial(get_wsd_schedule, num_decay_steps=12),
    "inverse_sqrt": functools.partial(get_scheduler, "inverse_sqrt"),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_a_schedule_is_transformers_own(kind: str) -> None:
    floor = 0.2 if kind in ("cosine", "polynomial") else 0.0
    ours: Any = {"kind": kind, "warmup_steps": WARM, "min_lr_ratio": floor, "power": 2.0, "decay_ratio": 0.2}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = THEIRS[kind](optimizer, num_warmup_steps=WARM, num_training_steps=TOTAL)
    theirs = []
    for _ in range(TOTAL):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = [rate(n, TOTAL, ScheduleConfig(**ours)) for n in range(TOTAL)]
    # Their first step is lost: its rate is 0. Ours climbs from there.
    assert found[: WARM - 1] == pytest.approx([1.0] * (WARM - 1) if kind == "constant" else theirs[1:WARM])
    assert found[WARM:] == pytest.approx(theirs[WARM:])


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("warm", [0, 1, 60])
def test_rates_stay_between_the_floor_and_the_top(kind: str, warm: int) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=warm, warmup_ratio=0.0, min_lr_ratio=0.1)  # type: ignore[arg-type]
    rates = [rate(step, 60, schedule) for step in range(61)]
    assert all(0.1 <= r <= 1.0 for r in rates[warm:]) and all(0 < r <= 1 for r in rates)
    assert all(a >= b for a, b in itertools.pairwise(rates[max(warm - 1, 0) :]))


def test_zero_pages_nothing() -> None:
    told = "optimizer adamw in place of paged_adamw_32bit: ZeRO deals its state out"
    assert choose_optimizer("paged_adamw_32bit", torch.device("cuda"), dealt=True) == ("adamw", told)
