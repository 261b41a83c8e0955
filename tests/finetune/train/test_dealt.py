"""Under the fused path two processes of which none has the whole base train as one that has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.finetune.config import RunConfig, override, to_json
from services.finetune.errors import ResourceExhausted
from services.finetune.orders import ArtifactRef, TrainRun
from services.finetune.progress import attempt_key, dump, raise_fence, read_outcome, run_uri
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import load, publish_directory
from services.finetune.train.dealt import Dealt
from services.finetune.train.model import load_model
from services.finetune.train.parallel import ALONE, Group
from services.finetune.train.ranks import Place
from services.finetune.train.stage import load_base
from tests.finetune.train.dealing import SHORT, fused_here
from tests.finetune.train.llava import rows_with_images, tiny_llava
from tests.finetune.train.running import told as events
from tests.finetune.train.test_images_parallel import PROJECTOR, SEEING
from tests.finetune.train.test_parallel import META, PLAIN, QLORA, STEPS, Told, launch, losses, norms, order
from tests.finetune.train.test_ranks import KEY, until
from tests.finetune.train.together import checkpoints, go
from tests.tiny import tiny_model

DEALT = {"parallel.deepspeed": "deepspeed_zero3"}
# As many blocks to look at as there are, too, are odd: one rank has nothing to read while it gives what it has.
MORE: dict[str, Any] = {"validation.ratio": 0.2, "validation.every": 3}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": QLORA,
    "flat_scales": {**QLORA, "quant.double_quant": False},
    "twice": {"model.gradient_checkpointing": "full"},
    "some": {"lora.targets": ["k_proj", "down_proj"]},
}
SEES: dict[str, dict[str, Any]] = {"sees": {}, "projector": PROJECTOR}
RESUMED = ("lora", "qlora")
TWO: dict[str, Any] = {"schedule.batch_size": 2}
HALVED: dict[str, Any] = {"schedule.accumulate": 6}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, TrainRun], Path]:
    folder = tmp_path_factory.mktemp("dealt")
    store = open_store((folder / "store").as_uri())
    run = order(store, folder)
    runs = {name: replace(run, config=override(run.config, {**MORE, **changes})) for name, changes in KINDS.items()}
    base = publish_directory(store, "base", tiny_llava(folder / "llava"), meta=META)
    seeing = TrainRun(
        job="workspaces/default/trainingJobs/t",
        config=override(RunConfig(), SEEING),
        base=ArtifactRef(name="base", digest=base),
        datasets=(ArtifactRef(name="rows", digest=rows_with_images(store)),),
    )
    runs |= {name: replace(seeing, config=override(seeing.config, changes)) for name, changes in SEES.items()}
    return store, runs, folder


@pytest.fixture(scope="module")
def alone(place: tuple[Store, dict[str, TrainRun], Path]) -> Told:
    """What one process tells, which has the base whole."""
    store, runs, folder = place
    with pytest.MonkeyPatch.context() as patch:
        fused_here(patch)
        return {name: go(store, f"alone-{name}", to_json(run), ALONE, folder / name) for name, run in runs.items()}


@pytest.fixture(scope="module")
def told(place: tuple[Store, dict[str, TrainRun], Path], alone: Told) -> Told:
    _, runs, folder = place
    orders: dict[str, Mapping[str, Any]] = {}
    for name, run in runs.items():
        dealt = replace(run, config=override(run.config, DEALT))
        orders[name] = {"run": to_json(dealt), "resume": None}
        if name in RESUMED:
            half = ArtifactRef(name="half", digest=checkpoints(list(alone[name]))[3])
            orders[f"{name}_after_one"] = {"run": to_json(replace(dealt, resume=half)), "resume": None}
    lora = override(runs["lora"].config, DEALT)
    for name in ("at_two", "at_one", *SHORT):
        changes = HALVED if name == "at_one" else {} if name == "short_alone" else TWO
        orders[name] = {"run": to_json(replace(runs["lora"], config=override(lora, changes))), "resume": None}
    return launch(folder, orders, "tests.finetune.train.dealing")


def looks(told: list[dict[str, Any]]) -> list[float]:
    return [e["values"]["validation_loss"] for e in told if e["type"] == "metric" and "validation_loss" in e["values"]]


def trained(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e for e in told if e["type"] != "metric" or "loss" in e["values"]]


@pytest.mark.parametrize("kind", [*KINDS, *SEES])
def test_dealt_layers_train_as_whole_ones(told: Told, alone: Told, kind: str) -> None:
    ours, one = trained(told[kind]), trained(alone[kind])
    assert losses(ours) == pytest.approx(losses(one), rel=1e-6)
    assert norms(ours) == pytest.approx(norms(one), rel=1e-4)
    assert looks(told[kind]) == pytest.approx(looks(alone[kind]), rel=1e-6)
    assert kind in SEES or len(looks(told[kind])) == 2
    # Both ranks answer, through the model's own forward.
    assert [e["answer"] for e in ours if e["type"] == "sample"] == [e["answer"] for e in one if e["type"] == "sample"]
    said = [e["text"] for e in ours if e["type"] == "log"]
    assert any("fused kernels over layers dealt out to 2 processes" in text for text in said)


def warnings(told: list[dict[str, Any]]) -> list[str]:
    return [e["text"] for e in told if e["type"] == "log" and e["level"] == "warning"]


HALVES = [name for name in SHORT if name not in ("short_always", "short_alone")]


@pytest.mark.parametrize("name", HALVES)
def test_memory_that_runs_out_on_one_rank_halves_the_steps_of_all(told: Told, name: str) -> None:
    """Wherever in a micro-step: the other rank is in the midst of gathers then, and of blocks of its own."""
    ours, theirs = trained(told[name]), trained(told["at_one"])
    (warning,) = warnings(ours)
    assert warning.startswith("memory ran out at step 2: 1 blocks at a time in place of 2")
    assert losses(ours)[0] == losses(trained(told["at_two"]))[0]
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)
    assert norms(ours) == pytest.approx(norms(theirs), rel=1e-4)
    # Nothing is left of what was computed before: the place makes no difference to any bit.
    assert (losses(ours), norms(ours)) == (losses(trained(told[HALVES[0]])), norms(trained(told[HALVES[0]])))
    assert looks(told[name]) == pytest.approx(looks(told["at_one"]), rel=1e-6)


def test_one_block_at_a_time_runs_layers_twice(told: Told) -> None:
    (warning,) = warnings(told["short_alone"])
    assert warning.startswith("memory ran out at step 2: all layers run forward twice")
    assert losses(trained(told["short_alone"])) == losses(trained(told["lora"]))


def test_a_second_time_all_ranks_say_what_would_help(told: Told) -> None:
    """And none hangs: the orders after this one are trained by the same processes."""
    (error,) = told["short_always"]
    assert error["reason"] == "OUT_OF_MEMORY" and "again, with 1 blocks" in error["message"]


def test_memory_that_runs_out_in_a_gather_is_no_rank_s_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gather(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    one = Dealt(Group(Place(0, 2, 0)), torch.device("cpu"))
    load_model(tiny_model(tmp_path), override(RunConfig(), PLAIN), torch.float32, one)
    monkeypatch.setattr("services.finetune.train.dealt._all_gather", gather)
    with pytest.raises(ResourceExhausted, match=r"schedule\.batch_size"):
        one.enter(0, 1)


@pytest.mark.parametrize("kind", RESUMED)
def test_two_processes_go_on_from_the_checkpoint_of_one(told: Told, alone: Told, kind: str) -> None:
    assert losses(trained(told[f"{kind}_after_one"])) == pytest.approx(losses(trained(alone[kind]))[3:], rel=1e-6)


@pytest.mark.parametrize("kind", RESUMED)
def test_one_process_goes_on_from_the_checkpoint_of_two(
    place: tuple[Store, dict[str, TrainRun], Path],
    told: Told,
    alone: Told,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, runs, folder = place
    fused_here(monkeypatch)
    half = ArtifactRef(name="half", digest=checkpoints(told[kind])[3])
    after = go(store, f"after-{kind}", to_json(replace(runs[kind], resume=half)), ALONE, folder / f"after-{kind}")
    assert losses(trained(after)) == pytest.approx(losses(trained(alone[kind]))[3:], rel=1e-6)


def attempt(store: Store, run: TrainRun, number: int, **environ: str) -> subprocess.Popen[bytes]:
    """A worker that leads two ranks."""
    raise_fence(store, KEY, number)
    store.put(f"{attempt_key(KEY, number)}/run.json", dump(to_json(run)))
    command = [sys.executable, "-m", "tests.finetune.train.dealing", "train", run_uri(store.uri, KEY, number)]
    return subprocess.Popen(command, env={**os.environ, **environ, "OMP_WAIT_POLICY": "PASSIVE"})


def test_sigterm_keeps_what_was_learned_to_the_bit(place: tuple[Store, dict[str, TrainRun], Path], told: Told) -> None:
    store, runs, _ = place
    changes = {**DEALT, "parallel.processes": 2}
    run = replace(runs["lora"], config=override(runs["lora"].config, changes))
    worker = attempt(store, run, 1, HOLD="4")
    try:
        until(worker, lambda: len(losses(trained(events(store, KEY, "metric")))) == 4)
        worker.terminate()
        assert worker.wait(300) == 0
    finally:
        worker.kill()
    ended = read_outcome(store, KEY)
    assert ended is not None and ended[1].state == "CANCELLED"
    assert max(checkpoints(events(store, KEY, "checkpoint"))) == 5  # not one of those that are saved anyway
    # As the service does after a SIGTERM that nobody asked it for.
    store.put(f"{KEY}/lease.json", dump({"attempt": 1, "outcome": None}))
    worker = attempt(store, run, 2)
    try:
        assert worker.wait(300) == 0
    finally:
        worker.kill()
    both = [e for number in (1, 2) for e in events(store, KEY, "metric", number)]
    assert (losses(trained(both)), norms(trained(both))) == (
        losses(trained(told["lora"])),
        norms(trained(told["lora"])),
    )
    ours, theirs = (
        {f.path: f.digest for f in load(store, found[STEPS]).files if f.path.endswith(".safetensors")}
        for found in (checkpoints(events(store, KEY, "checkpoint", 2)), checkpoints(told["lora"]))
    )
    assert ours and ours == theirs


@pytest.mark.parametrize("method", [{}, QLORA])
def test_what_all_keep_of_a_layer_is_that_layer(tmp_path: Path, method: dict[str, Any]) -> None:
    """No rank has another's part, and parts end in the middle of weights."""
    folder, config = tiny_model(tmp_path, hidden_size=64), override(RunConfig(), {**PLAIN, **method})
    dealt = [Dealt(Group(Place(rank, 3, rank)), torch.device("cpu")) for rank in range(3)]
    loaded = [load_model(folder, config, torch.float32, one) for one in dealt]
    whole = load_model(folder, config, torch.float32).get_base_model()
    for number, layer in enumerate(whole.model.layers):
        # What a gather does, into the place of the first rank's own views.
        torch.cat([one.parts[number] for one in dealt], out=dealt[0].places[number % 2])
        ours = loaded[0].get_base_model().model.layers[number]
        for name, parameter in layer.named_parameters():
            mine = ours.get_parameter(name)
            assert torch.equal(mine, parameter), name
            if hasattr(parameter, "quant_state"):
                state, theirs = mine.quant_state, parameter.quant_state
                assert torch.equal(state.absmax, theirs.absmax) and torch.equal(
                    state.state2.absmax, theirs.state2.absmax
                )
    (size,) = {len(part) for one in dealt for part in one.parts}
    assert all(one.places.shape == (2, 3 * size) for one in dealt)


def test_what_the_fused_path_does_not_know_is_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused_here(monkeypatch)
    changes = {**PLAIN, **DEALT, "lora.rank_pattern": {"q_proj": 2}}  # unlike k and v, which share its input
    said: list[str] = []
    group, folder = Group(Place(0, 2, 0)), tiny_model(tmp_path)
    model, dealt = load_base(folder, override(RunConfig(), changes), torch.float32, False, group, said.append)
    assert dealt is None and said == [
        "not dealt out under the fused kernels: projections of one input with different LoRA settings"
    ]
    whole = load_model(folder, override(RunConfig(), changes), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
