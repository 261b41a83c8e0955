"""A ZeRO-3 checkpoint to safetensors in float32, beside DeepSpeed's zero_to_fp32.

The checkpoint has the layout of DeepSpeed 0.19.8 with 8 ranks, random numbers, and the shapes of a Llama. DeepSpeed is no
dependency of ours: QUARTET_BENCH_DEEPSPEED names the python of an environment that has it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

RANKS = 8
PEER = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
convert_zero_checkpoint_to_fp32_state_dict(sys.argv[1], sys.argv[2], max_shard_size="2GB", safe_serialization=True, tag="z")
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """A Llama with hidden 2048, 5632 in its MLPs, and 32,000 tokens."""
    hidden, mlp = 2048, 5632
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32000, hidden),
        "lm_head.weight": (32000, hidden),
    }
    for n in range(layers):
        at = f"model.layers.{n}."
        found |= {f"{at}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        found |= {f"{at}mlp.{p}_proj.weight": (mlp, hidden) for p in ("gate", "up")}
        found |= {f"{at}mlp.down_proj.weight": (hidden, mlp), f"{at}input_layernorm.weight": (hidden,)}
    return found


def make(folder: Path, layers: int) -> int:
    """Write the checkpoint; the bytes of its float32 numbers."""
    import torch

    wanted = OrderedDict((k, torch.Size(v)) for k, v in shapes(layers).items())
    each = sum(-(-shape.numel() // RANKS) for shape in wanted.values())
    folder.mkdir()
    for rank in range(RANKS):
        at = f"zero_pp_rank_{rank}_mp_rank_00"
        model: dict[str, Any] = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [wanted],
            "shared_params": {},
            "ds_version": "0.19.8",
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "dp_world_size": RANKS,
        }
        torch.save(model, folder / f"{at}_model_states.pt")
        state = {"zero_stage": 3, "partition_count": RANKS, "fp32_flat_groups": [torch.randn(each)]}
        torch.save({"optimizer_state_dict": state}, folder / f"{at}_optim_states.pt")
    return sum(4 * shape.numel() for shape in wanted.values())


def ours(source: Path, out: Path) -> None:
    from services.finetune.convert.checkpoints import read_checkpoint
    from services.finetune.convert.shards import cast_bytes, plan, write

    tensors = read_checkpoint(source, threading.Event()).tensors
    shards = plan((t.cast("") for t in tensors.values()), 2_000_000_000)
    write(out, shards, lambda t: cast_bytes(tensors[t.name], ""), lambda t: None)


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds, and the most MB that the process or one of its own had in memory; the page cache is dropped before."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, command
    return time.monotonic() - began, usage.ru_maxrss / 1024


def bench_consolidate(peer: str, rounds: int = 3, layers: int = 8) -> dict[str, list[float]]:
    """Seconds and MB of both, in turn."""
    found: dict[str, list[float]] = {"seconds": [], "peer seconds": [], "MB": [], "peer MB": []}
    with tempfile.TemporaryDirectory() as home:
        source = Path(home) / "z"
        # In a process of its own: a child's peak counts what its parent had in memory when it began.
        command = [sys.executable, "-m", "tests.bench.consolidate", "--make", str(source), str(layers)]
        found["bytes"] = [int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)]
        for _ in range(rounds):
            for who, words in {
                "": [sys.executable, "-m", "tests.bench.consolidate", str(source)],
                "peer ": [peer, "-c", PEER, home],
            }.items():
                with tempfile.TemporaryDirectory(dir=home) as out:
                    seconds, size = measured([*words, out])
                found[f"{who}seconds"].append(seconds)
                found[f"{who}MB"].append(size)
    return found


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        print(make(Path(sys.argv[2]), int(sys.argv[3])))
    else:
        ours(Path(sys.argv[1]), Path(sys.argv[2]))
