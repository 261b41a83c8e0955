"""From a config to a run, as who knows XTuner does it: list, copy, edit, train; texts are read, never executed."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.stack import Stack
from tests.tiny import tiny_model

RECIPES = Path(__file__).parents[1] / "finetune" / "recipes"
SEED = (RECIPES / "xtuner" / "seed.py.txt").read_text("utf-8")
NAME = "internlm_chat_7b_qlora_oasst1_e3"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the tutorial's: the model and the data beside the config."""
    folder = tmp_path_factory.mktemp("ft-oasst1")
    tiny_model(folder / "internlm-chat-7b", hidden_size=64)
    (folder / "openassistant-guanaco").mkdir()
    for split, count in (("train", 24), ("eval", 2)):
        lines = [
            json.dumps({"instruction": f"{split} {n}?", "input": "", "output": f"{n}."}) + "\n" for n in range(count)
        ]
        (folder / "openassistant-guanaco" / f"openassistant_best_replies_{split}.jsonl").write_text("".join(lines))
    (folder / "openassistant-guanaco" / "README.md").write_text("# guanaco\n")
    return folder


@pytest.fixture()
def run(stack: Stack, home: Path) -> Run:
    """The command line in that folder."""

    def quartet(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "QUARTET_ENDPOINT": stack.address}
        command = [sys.executable, "-m", "services.client", *words]
        return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=300)

    return quartet


def edited(home: Path, name: str, *changes: tuple[str, str]) -> str:
    text = SEED
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (home / name).write_text(text, "utf-8")
    return f"./{name}"


def test_list_cfg_prints_the_tutorials_list(run: Run) -> None:
    names = [
        line.split("\t")[0] for line in (RECIPES / "reference" / "xtuner_seed_tuples.tsv").read_text().splitlines()
    ]
    frame = ("=" * 26 + "CONFIGS" + "=" * 27, "=" * 61)
    assert run("list-cfg", "--seed").stdout.splitlines() == [frame[0], *sorted(names[1:]), frame[1]]
    whole = run("list-cfg").stdout.splitlines()
    cut = next(n for n, line in enumerate(whole) if "BEYOND XTUNER" in line)
    assert whole[1:cut] == sorted(names[1:]) and len(whole) > cut + 100
    found = run("list-cfg", "-p", "InternLM_Chat", "--seed").stdout.splitlines()
    assert found[1] == "PATTERN: InternLM_Chat" and found[3:-1] == sorted(n for n in names if "internlm_chat" in n)


def test_copy_cfg_writes_what_train_reads(run: Run, home: Path) -> None:
    assert run("copy-cfg", NAME, ".").returncode == 0
    path = home / f"{NAME}_copy.yaml"
    text = path.read_text("utf-8")
    changes = [("internlm/internlm-chat-7b", "./internlm-chat-7b"), ("format: oasst1", "format: alpaca")]
    changes += [
        ("hub_id: timdettmers/openassistant-guanaco", "files: [./openassistant-guanaco]"),
        ("lr: 0.0002", "lrr: 1"),
    ]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, "utf-8")
    refused = run("copy-cfg", NAME, ".")
    assert refused.returncode == 73 and "differs" in refused.stderr
    refused = run("train", path.name)
    line = next(n for n, content in enumerate(text.splitlines(), 1) if "lrr" in content)
    assert (
        refused.returncode == 65
        and f"{path.name}:{line}: unknown config key 'optim.lrr'; did you mean" in refused.stderr
    )
    path.write_text(text.replace("lrr: 1", "lr: 1e-3"), "utf-8")
    options = ["--cfg-options", "data.max_length=64", "max_epochs=1", "model.lora.r=4", "report.prompts=[]"]
    done = run("train", path.name, *options, "--json")
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert job["state"] == "SUCCEEDED" and job["config"]["lora"]["rank"] == 4 and job["config"]["optim"]["lr"] == 1e-3
    assert run("copy-cfg", "deepspeed_zero2", ".").returncode == 0
    assert json.loads((home / "deepspeed_zero2_copy.json").read_text())["zero_optimization"]["stage"] == 2


def test_the_seeds_edited_config_trains(run: Run, home: Path) -> None:
    """The model's folder and the data's are found beside it, brought over once, and learned from."""
    config = edited(
        home,
        f"{NAME}_copy.py",
        ("import oasst1_map_fn", "import alpaca_map_fn"),
        ("dataset_map_fn=oasst1_map_fn", "dataset_map_fn=alpaca_map_fn"),
        ("max_length = 2048", "max_length = 64"),
        ("accumulative_counts = 16", "accumulative_counts = 2"),
        ("r=64", "r=4"),
    )
    done = run("train", config, "--work-dir", "work_dirs/x", "--json", "--name", "seeds", "--cfg-options", "lr=1e-3")
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    made = job["config"]
    assert (made["method"], made["quant"]["bits"], made["optim"]["lr"]) == ("qlora", 4, 1e-3)
    assert (made["schedule"]["epochs"], made["lora"]["rank"], made["report"]["checkpoint_epochs"]) == (3, 4, 1)
    assert "float16 with loss scaling becomes model.dtype auto" in done.stderr
    kept = home / "work_dirs" / "x"
    assert (kept / "last_checkpoint").read_text() == job["result"] and (kept / "job").read_text() == job["name"]
    # One checkpoint for each of the three epochs.
    steps = sorted(
        int(line.split()[-1]) for line in run("job", "logs", "seeds").stdout.splitlines() if " checkpoint " in line
    )
    assert len(steps) == 3 and steps[2] == 3 * steps[0]
    again = run(
        "train", "work_dirs/x/" + f"{NAME}_copy.yaml", "--detach", "--json", "--cfg-options", "schedule.max_steps=1"
    )
    assert again.returncode == 0, again.stderr
    assert "importing" not in again.stderr and json.loads(again.stdout)["base_model"] == job["base_model"]
    assert json.loads(again.stdout)["datasets"] == job["datasets"]


def test_a_run_is_looked_at_and_leaves_its_files(run: Run, home: Path) -> None:
    config = edited(
        home,
        "looked.py",
        ("import oasst1_map_fn", "import alpaca_map_fn"),
        ("dataset_map_fn=oasst1_map_fn", "dataset_map_fn=alpaca_map_fn"),
        ("max_length = 2048", "max_length = 64"),
        ("accumulative_counts = 16", "accumulative_counts = 2"),
    )
    options = ("--cfg-options", "validation.ratio=0.25", "validation.every=2", "schedule.max_steps=6")
    kept = ("--save-every", "1", "--keep-last", "2", "--keep-best")
    done = run("train", config, "--json", "--name", "looked", *kept, *options)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    logs = run("job", "logs", "looked").stdout
    assert "18 samples of 24 rows" in logs and "6 samples to look at" in logs
    losses = dict(re.findall(r"step (\d+)  validation loss ([0-9.]+)", logs))
    assert list(losses) == ["2", "4", "6"]
    best = min(losses, key=lambda step: (float(losses[step]), int(step)))
    assert job["result"].endswith(f"/checkpoints/{best}")
    listed = json.loads(run("job", "files", "looked", "--json").stdout)["files"]
    fetched = run("job", "download", "looked", "files")
    assert fetched.returncode == 0, fetched.stderr
    for file in listed:
        assert (home / "files" / file["path"]).stat().st_size == file["size_bytes"]
    assert (home / "files" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(gzip.decompress((home / "files" / "steps.jsonl.gz").read_bytes()).splitlines()) == 6


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        (("lr = 2e-4", "lr = open('/etc/passwd')"), [], ":40:6: open is bound by nothing before this line"),
        (("type=optim_type", "type=torch.optim.Lion"), [], "optim_wrapper.optimizer.type"),
        (("'./internlm-chat-7b'", "'./no-such-model'"), [], "./no-such-model is not here; give --base"),
        (("'./openassistant-guanaco'", "'me/rows'"), [], "the rows of me/rows are on a hub"),
        (("lr = 2e-4", "lr = 2e-4"), ["--cfg-options", "lrr=1"], "binds no lrr"),
        (
            ("lr = 2e-4", "lr = 2e-4"),
            ["--deepspeed", "deepspeed_zero3"],
            "'deepspeed_zero3' is not supported by the trainer",
        ),
        (("lr = 2e-4", "lr = 2e-4"), ["--deepspeed", "deepspeed_zero9"], "--deepspeed: deepspeed_zero9 is no preset"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Run, home: Path, change: tuple[str, str], words: list[str], told: str
) -> None:
    done = run("train", edited(home, "wrong.py", change), *words)
    assert done.returncode in (64, 65, 66) and told in done.stderr and "Traceback" not in done.stderr
    assert "importing" not in done.stderr and "uploading" not in done.stderr


def test_a_hubs_name_says_how_to_import_it(run: Run, home: Path) -> None:
    done = run("train", NAME, "--data", "openassistant-guanaco")
    assert done.returncode == 66 and "run: quartet model import internlm/internlm-chat-7b" in done.stderr
