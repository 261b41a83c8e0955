"""Makes the checkpoints in this folder with mmengine 0.10.6 and DeepSpeed 0.19.8, as XTuner 0.1 and 0.2 do.

In an environment of its own (torch, deepspeed==0.19.8, mmengine==0.10.6, transformers, peft), from the repository's root:

    PYTHONPATH=. torchrun --nproc_per_node 2 tests/finetune/convert/golden/make.py

XTuner trains SupervisedFinetune, whose `llm` is a PEFT model, and keeps only what is trained. Each checkpoint lies in a
folder <name>/ beside <name>.safetensors, which holds what the original tools read from it: torch.load for a file, and
DeepSpeed's get_fp32_state_dict_from_zero_checkpoint for a directory.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import peft
import torch
import transformers
from mmengine import Config, MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner
from safetensors.torch import save_file

from tests.finetune.convert.golden.base import full_base, lora_base

HERE = Path(__file__).parent
XTUNER = """
SYSTEM = ''
model = dict(
    type='xtuner.model.SupervisedFinetune',
    llm=dict(type='AutoModelForCausalLM.from_pretrained', pretrained_model_name_or_path='tiny'),
    lora=dict(type='peft.LoraConfig', r=2, lora_alpha=6, lora_dropout=0.1, bias='none', task_type='CAUSAL_LM'))
"""
LORA = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
rank = int(os.environ["RANK"])


class Finetune(BaseModel):  # type: ignore[misc]
    """What of SupervisedFinetune decides names and contents of its checkpoints."""

    def __init__(self, llm: Any, trained_only: bool) -> None:
        super().__init__()
        self.llm, self.trained_only = llm, trained_only

    def forward(self, ids: Any, mode: str = "loss") -> Any:
        return {"loss": self.llm(input_ids=ids, labels=ids).loss}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().state_dict(*args, **kwargs)
        if not self.trained_only:
            return found
        return type(found)((k, v) for k, v in found.items() if "lora_" in k)


def model(base: Any, lora: bool) -> Finetune:
    if rank == 0 and not (HERE / "base" / base.__name__).exists():
        base(HERE / "base" / base.__name__)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    folder = HERE / "base" / base.__name__
    llm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    return Finetune(peft.get_peft_model(llm, LORA) if lora else llm, lora)


def rows(vocabulary: int) -> Any:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(3, vocabulary, (2, 12), generator=generator) for _ in range(4)]


def file() -> None:
    """iter_4.pth, by mmengine's own Runner."""
    config = Config.fromstring(XTUNER, ".py")
    place = HERE / "work"
    loader = {
        "batch_size": None, "dataset": [{"ids": ids} for ids in rows(259)],
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "collate_fn": {"type": torch.utils.data.default_convert},
    }  # fmt: skip
    runner = Runner(
        model=model(lora_base, True),
        work_dir=str(place),
        cfg=config,
        experiment_name="tiny",
        train_dataloader=loader,
        train_cfg={"by_epoch": False, "max_iters": 4},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.05}},
        param_scheduler=[{"type": "CosineAnnealingLR", "T_max": 4, "by_epoch": False}],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 4}},
    )
    runner.train()
    state = torch.load(place / "iter_4.pth", weights_only=False)
    # Where it was made is nobody's business.
    state["message_hub"]["runtime_info"]["last_ckpt"] = "work_dirs/tiny/iter_4.pth"
    for about in (state["meta"], state["message_hub"]["runtime_info"]):
        about["mmengine_version"] = "0.10.6"
    torch.save(state, HERE / "iter_4.pth")
    found = state["state_dict"]
    save_file({k: v.clone() for k, v in found.items()}, HERE / "iter_4.safetensors")


def zero(name: str, stage: int, lora: bool, bf16: bool, optimizer: str) -> None:
    base, vocabulary = (lora_base, 259) if lora else (full_base, 259)
    settings = {
        "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    whole = model(base, lora)
    parameters = [p for p in whole.parameters() if p.requires_grad]
    made = getattr(torch.optim, optimizer)(parameters, lr=0.05)
    engine, *_ = deepspeed.initialize(model=whole, model_parameters=parameters, optimizer=made, config=settings)
    for ids in rows(vocabulary):
        engine.backward(engine(ids)["loss"])
        engine.step()
    hub = MessageHub.get_instance("golden")
    hub.update_scalar("train/loss", 1.5)
    meta = {"cfg": Config.fromstring(XTUNER, ".py").pretty_text, "iter": 4, "epoch": 1}
    state = {"meta": meta, "message_hub": hub.state_dict(), "param_schedulers": []}
    # As mmengine's DeepSpeedStrategy.save_checkpoint does.
    engine.save_checkpoint(str(HERE), tag=f"{name}.pth", client_state=state, save_latest=False,
                           exclude_frozen_parameters=True)  # fmt: skip
    if rank == 0:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        found = get_fp32_state_dict_from_zero_checkpoint(str(HERE), f"{name}.pth", exclude_frozen_parameters=True)
        save_file({k: v.clone().contiguous() for k, v in found.items()}, HERE / f"{name}.safetensors")
    torch.distributed.barrier()


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, and is not needed
    deepspeed.init_distributed(dist_backend="gloo")
    zero("zero1", 1, True, True, "AdamW")
    zero("zero2", 2, True, True, "AdamW")
    zero("zero3", 3, True, True, "AdamW")
    zero("zero3_full", 3, False, False, "SGD")
    if rank == 0:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            os.environ[name] = {"WORLD_SIZE": "1"}.get(name, "0")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank == 0:
        file()
        shutil.rmtree(HERE / "work")
        shutil.rmtree(HERE / "base")
        for name in ("zero_to_fp32.py", "zero_to_torch.py"):
            (HERE / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
