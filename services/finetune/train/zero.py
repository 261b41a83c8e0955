"""ZeRO by DeepSpeed: gradients, optimizer state and weights dealt out over the ranks (Rajbhandari et al. 2020).

DeepSpeed's engine reduces, clips and updates; batches, loss, rates and checkpoints stay the trainer's own. A checkpoint
holds whole tensors by parameter name, so a run goes on with any number of ranks, in any stage or without one.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from services.finetune.errors import FailedPrecondition
from services.finetune.packing import IGNORED, Blocks
from services.finetune.plan import BUCKET
from services.finetune.recipes.deepspeed import preset_json
from services.finetune.train.engine import Unscale, tensors
from services.finetune.train.images import Images
from services.finetune.train.model import causal_of, summed_loss
from services.finetune.train.parallel import Batch, Group
from services.finetune.train.seeing import with_images

STATE = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""


class Zero:
    """An Engine (engine.py) by DeepSpeed, which also updates the weights. All acts are collective."""

    collective = True
    repeats = False
    """A rank alone cannot leave what all take together."""

    def __init__(
        self,
        model: Any,
        blocks: Blocks,
        device: torch.device,
        group: Group,
        settings: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        images: Images | None = None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.device = device
        self.group = group
        self.settings = dict(settings)
        self.stage = int(settings["zero_optimization"]["stage"])
        self.dealt = self.stage == 3
        self.dtype = dtype
        self.images = images
        self.engine: Any = None

    def start(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Deal model and optimizer out; what rates are to be set on from now on."""
        deepspeed = load_deepspeed(self.device)
        causal = causal_of(self.model)
        if self.stage == 3:
            reread(causal)
        # DeepSpeed ends an autocast that comes from outside. Copies are not cached: of dealt weights none may stay.
        mixed = torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32, cache_enabled=False)
        causal.forward = mixed(with_images(causal) if self.images else causal.forward)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.engine, partitioned, _, _ = deepspeed.initialize(
                # Its hooks must sit on the module that is called.
                model=causal,
                optimizer=optimizer,
                config=self.settings,
            )
        made: torch.optim.Optimizer = partitioned
        return made

    def begin(self, tokens: int, reserved: int) -> str:
        return ""

    def backprop(self, batch: Batch, learned: int, seed: int, scale: float = 1.0) -> Tensor:
        loss = self._summed(self.blocks, batch) / learned
        # DeepSpeed takes the mean over ranks; the loss is a sum's part already.
        self.engine.backward(loss * self.group.world, scale_wrt_gas=False)
        return loss.detach()

    def agree(self) -> None:
        """Memory that runs out ends the run."""

    def combine(self, parameters: list[Tensor], clip_norm: float, unscale: Unscale = None) -> Tensor:
        """Update the weights too: DeepSpeed reduces, clips and updates in one. It knows no loss scale of others."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Done by `combine`."""

    @torch.no_grad()
    def look(self, blocks: Blocks, batch: Batch) -> Tensor:
        self.model.eval()
        return self._summed(blocks, batch)

    def spare(self) -> str:
        """Nothing: no step is taken anew."""
        return ""

    def _summed(self, blocks: Blocks, batch: Batch) -> Tensor:
        idle = not len(batch)
        # A rank without blocks of its own still takes part: it reads one and learns nothing of it.
        read = np.zeros(1, np.int64) if idle else batch
        ids, labels, positions, segments = tensors(blocks, read, self.device)
        if idle:
            labels.fill_(IGNORED)
        seen = None
        if self.images:
            # Dealt weights are gathered by all ranks together, and gradients combined: whoever has no image looks at black.
            seen = self.images.seen(blocks, read, packed=False, always=self.stage == 3 or self.images.trained)
        asked = {"dtype": torch.float32, "call": self.engine, "seen": seen}
        return summed_loss(self.model, ids, labels, positions, segments, **asked)

    # ------------------------------------------------------------------------------------------ checkpoints

    def whole(self, parameter: Tensor) -> Tensor:
        """A trainable weight, put together."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage < 3:
            return parameter
        value: Tensor = safe_get_full_fp32_param(parameter)
        return value.view(parameter.ds_shape)  # type: ignore[attr-defined]  # DeepSpeed's

    def state(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """("<parameter>|<slot>", tensor) of the optimizer's state, put together one by one; empty before the first step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage < 3 and self._steps():
            # DeepSpeed links state to weights when its first group of parameters took a step, and the others have none.
            self._link()
        for name, parameter in parameters.items() if self._steps() else ():
            for slot in STATE:
                value = safe_get_full_optimizer_state(parameter, slot)
                yield f"{name}|{slot}", value.view(getattr(parameter, "ds_shape", parameter.shape))
            yield f"{name}|step", torch.tensor(float(self._steps()))

    @contextlib.contextmanager
    def writing(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, weights may be set as those of any model."""
        from deepspeed import zero
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        values = list(parameters.values())
        with zero.GatheredParameters(values, modifier_rank=0) if self.stage == 3 else contextlib.nullcontext():
            yield
        for value in values:
            if self.stage == 3:
                safe_set_local_fp32_param(value, value.ds_tensor)  # type: ignore[attr-defined]  # DeepSpeed's
            else:
                safe_set_full_fp32_param(value, value.data)

    def fill(self, parameters: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Any]]) -> None:
        """Set the optimizer's state, given whole: {parameter: {slot: tensor}}."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not state:
            return
        steps = {float(slots["step"]) for slots in state.values()}
        if len(steps) != 1 or any(not set(STATE) <= set(slots) for slots in state.values()):
            raise FailedPrecondition(
                "the checkpoint's optimizer is not AdamW with one count of steps; go on without DeepSpeed",
                reason="RESUME_MISMATCH",
            )
        self._make_state(steps.pop())
        for name, parameter in parameters.items():
            for slot in STATE:
                value = state[name][slot].to(self.device)
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameter, self._part(parameter, value), slot)
                else:
                    safe_set_full_optimizer_state(parameter, value, slot)

    def _part(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a tensor, as ZeRO-3 deals it out: equal parts, the last one padded."""
        size = parameter.ds_tensor.numel()
        flat = torch.nn.functional.pad(value.reshape(-1), (0, size * self.group.world - value.numel()))
        return flat.narrow(0, size * self.group.rank, size)

    def _flats(self) -> list[Tensor]:
        """The tensors that the optimizer itself sees: this rank's parts, many in one."""
        zero = self.engine.optimizer
        flats: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return flats

    def _steps(self) -> int:
        state = self.engine.optimizer.optimizer.state
        return next((int(state[f]["step"]) for f in self._flats() if f in state), 0)

    def _make_state(self, step: float) -> None:
        """The optimizer makes its state at its first step; a resumed one must have it before."""
        zero = self.engine.optimizer
        for flat in self._flats():
            zero.optimizer.state[flat] = {
                "step": torch.tensor(step, device=flat.device if _fused(zero.optimizer) else None),
                **{slot: torch.zeros_like(flat.data) for slot in STATE},
            }
        if self.stage < 3:
            self._link()

    def _link(self) -> None:
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()


class _Reread(torch.autograd.Function):
    """x W^T of a 4-bit layer whose weights are read anew for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, _dense(layer))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ _dense(ctx.layer), None


def _dense(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weights: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weights.to(layer.compute_dtype)


def reread(causal: Any) -> None:
    """Let 4-bit layers go through _Reread: bitsandbytes' own function holds the weights that it was given until the backward
    pass, out of reach of checkpointing. So all that ZeRO-3 puts together for a moment would stay, the whole base."""
    from bitsandbytes.nn.modules import Linear4bit

    for layer in causal.modules():
        if isinstance(layer, Linear4bit):

            def forward(x: Tensor, layer: Any = layer) -> Tensor:
                y: Tensor = _Reread.apply(x.to(layer.compute_dtype), layer)
                return (y if layer.bias is None else y + layer.bias).to(x.dtype)

            layer.forward = forward  # type: ignore[method-assign]


def settings_of(preset: str, clip_norm: float, trainable: int) -> dict[str, Any]:
    """A preset as this trainer needs it: the trainer counts micro-steps, and nothing is printed."""
    settings = preset_json(preset)
    tuned = {**settings["zero_optimization"]}
    # Small parts that every rank keeps whole save little; 4-bit weights of few bytes would all be such parts.
    tuned |= {"stage3_param_persistence_threshold": 0} if tuned["stage"] == 3 else {}
    # Buffers of this size are made whatever is trained: for LoRA gigabytes, and on a CPU seconds a step.
    buckets = ("reduce_bucket_size",) if tuned["stage"] == 3 else ("reduce_bucket_size", "allgather_bucket_size")
    tuned |= dict.fromkeys(buckets, min(BUCKET, trainable))
    if not torch.cuda.is_available():
        tuned["overlap_comm"] = False
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "zero_optimization": tuned,
    }


def load_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told to compile nothing. FailedPrecondition (DEEPSPEED_MISSING)."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import deepspeed
        except ImportError as error:
            raise FailedPrecondition(
                f"parallel.deepspeed needs the package deepspeed: {error}", reason="DEEPSPEED_MISSING"
            ) from error
    # It calls torch.distributed by names that are about to go.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Shared memory between ranks on a CPU is a kernel that it would compile first, and fail without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        # One process that offloads is a group as well, and DeepSpeed asks a launcher's word for which.
        os.environ.setdefault("LOCAL_RANK", "0")
        alone = dist.HashStore()  # type: ignore[attr-defined]  # torch's stubs leave it out
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=alone, rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))
