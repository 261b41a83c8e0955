"""python -m tests.bench.kills [KILLS]: kill -9 at random moments, ours and beside it Hugging Face's Trainer with its own.

Both train the same tiny Llama with LoRA and save every 5 steps; half of the kills fall while a checkpoint is written. A kill
is survived if the next start goes on by itself; at the end the adapter is compared with an uninterrupted run's.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from services.finetune.config import RunConfig, override
from services.finetune.orders import ArtifactRef, TrainRun
from services.finetune.progress import read_outcome
from services.finetune.store import open_store
from services.finetune.store.artifacts import File, Manifest, load, publish, publish_directory
from tests.finetune.train.killing import Toll, kill_often
from tests.finetune.train.test_kills import Worker
from tests.tiny import tiny_model

STEPS = 300
SEED = 20
META = {"architecture": "LlamaForCausalLM", "template": "tokenizer", "generation": {"eos_token_id": [2]}}


def ours(kills: int, folder: Path) -> tuple[Toll, bool]:
    store = open_store((folder / "store").as_uri())
    base = publish_directory(store, "base", tiny_model(folder / "tiny"), meta=META)
    lines = "".join(json.dumps({"instruction": f"say {n}", "output": f"{n} it is"}) + "\n" for n in range(48))
    blob = store.put_blob(lines.encode())
    manifest = Manifest("dataset", (File("a.jsonl", blob.digest, blob.size),), (), {"format": "alpaca", "rows": 48})
    changes = {"method": "lora", "quant.bits": 0, "lora.rank": 4, "data.max_length": 96, "schedule.accumulate": 2}
    changes |= {"schedule.max_steps": STEPS, "report.checkpoint_every": 5}
    order = TrainRun(
        job="bench",
        config=override(RunConfig(), changes),
        base=ArtifactRef(name="base", digest=base),
        datasets=(ArtifactRef(name="data", digest=publish(store, manifest)),),
    )
    whole = Worker(store, order, folder / "whole")
    whole.job = 1_000_000
    whole.start().wait()
    worker = Worker(store, order, folder / "work")
    toll = kill_often(worker, kills, SEED)

    def adapter(key: str) -> str:
        ended = read_outcome(store, key)
        return load(store, ended[1].result["checkpoint"]).file("adapter_model.safetensors").digest if ended else ""

    return toll, all(adapter(f"jobs/cut{n}") == adapter(whole.key) != "" for n in range(worker.job + 1))


class HuggingFace:
    """transformers.Trainer in a process of its own, told to resume from its last checkpoint if there is one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = 0
        folder.mkdir()

    @property
    def out(self) -> Path:
        return self.folder / f"run{self.run}"

    def start(self) -> subprocess.Popen[bytes]:
        if self.ended():
            self.run += 1
        return subprocess.Popen([sys.executable, "-m", "tests.bench.kills", "peer", str(self.out)])

    def ended(self) -> bool:
        return (self.out / "done").exists()


def peer(out: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(out.parent / "tiny"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = [[5 + (n * k) % 200 for k in range(1, 33)] for n in range(48)]
    rows = [{"input_ids": torch.tensor(i), "labels": torch.tensor(i)} for i in ids]
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_steps=5,
        save_total_limit=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=10_000,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    found = [p for p in out.glob("checkpoint-*") if p.is_dir()] if out.is_dir() else []
    trainer.train(resume_from_checkpoint=True if found else None)
    model.save_pretrained(str(out / "final"))
    (out / "done").write_text(hashlib.sha256((out / "final" / "adapter_model.safetensors").read_bytes()).hexdigest())


def theirs(kills: int, folder: Path) -> tuple[int, int, bool]:
    """(kills, of them survived, whether every run that ended is the uninterrupted one's equal). A run that cannot go on is
    given up, and another begun."""
    whole = HuggingFace(folder / "hf-whole")
    whole.start().wait()
    trainer = HuggingFace(folder / "hf")
    done, failed, seed = 0, 0, SEED
    while done < kills:
        toll = kill_often(trainer, kills - done, seed)
        done, seed = done + toll.kills, seed + 1
        if toll.lost:
            failed += 1
            trainer.run += 1
        elif not toll.kills:
            break
    digests = {p.read_text() for p in (folder / "hf").glob("run*/done")}
    return done, done - failed, digests <= {(whole.out / "done").read_text()}


def main() -> None:
    if sys.argv[1:2] == ["peer"]:
        peer(Path(sys.argv[2]))
        return
    kills = int(sys.argv[1]) if sys.argv[1:] else 50
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as text, ThreadPoolExecutor(1) as beside:
        other = beside.submit(theirs, kills, Path(text))
        toll, equal = ours(kills, Path(text))
        survived = toll.kills - len(toll.lost)
        print(
            f"ours: {survived} of {toll.kills} survived ({toll.in_writes} in writes), adapters equal: {equal}",
            flush=True,
        )
        count, survived, equal = other.result()
        print(f"transformers.Trainer: {survived} of {count} survived, adapters equal: {equal}")


if __name__ == "__main__":
    main()
