"""One optimizer step: which blocks, which gradients, which rate. On a GPU the host never waits inside a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.finetune import packing
from services.finetune.config import OptimConfig, RunConfig, ScheduleConfig
from services.finetune.errors import InvalidArgument
from services.finetune.packing import Blocks
from services.finetune.train.batch import ROUND
from services.finetune.train.engine import Batch, Engine


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a step once its numbers have reached the host."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float


@dataclass(slots=True)
class _Pending:
    step: int
    lr: float
    tokens: int
    began: float
    numbers: Tensor
    """loss and gradient norm, in host memory once `ready`."""
    ready: Any


class Stepper:
    """A model, its data and its optimizer, one step at a time.

    On a GPU a step's loss is looked at while the next one runs; `settle` waits for it. `tell` hears of every step, in order,
    `log` of what the engine decides.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Any,
        parameters: dict[str, Tensor],
        blocks: Blocks,
        engine: Engine,
        tell: Callable[[Told], None],
        log: Callable[[str], None],
    ) -> None:
        self.config = config
        self.model = model
        self.parameters = list(parameters.values())
        self.blocks = blocks
        self.engine = engine
        self.tell = tell
        self.log = log
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(config.optim, self.parameters)
        schedule = config.schedule
        self.per_epoch = math.ceil(len(blocks) / (schedule.batch_size * schedule.accumulate))
        self.total = schedule.max_steps or self.per_epoch * schedule.epochs
        self.step = 0
        self.loss = 0.0
        """Of the last settled step."""
        self.hold: Any = None
        """A CUDA event that the next change of the weights must wait for: something still reads them."""
        self._pending: _Pending | None = None
        self._settled = 0.0

    def take(self) -> None:
        """One step: the mean loss over all its learned tokens, whatever micro-batch they are in."""
        began, schedule = time.monotonic(), self.config.schedule
        # Dropout depends on seed and step only: a resumed step draws what the first try drew.
        seed = (schedule.seed << 32) + self.step + 1
        torch.manual_seed(seed)
        batches = self._batches()
        learned = sum(int((self.blocks.labels[b] >= 0).sum()) for b in batches)
        self.model.train()
        if text := self.engine.begin(self._most_tokens(), self._optimizer_bytes()):
            self.log(text)
        total = torch.zeros((), device=self.device)
        for n, batch in enumerate(batches):
            total += self.engine.backprop(batch, learned, (seed << 16) + n)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip_norm or math.inf)
        lr = self.config.optim.lr * rate(self.step, self.total, schedule)
        tokens = sum(int((self.blocks.segments[b] > 0).sum()) for b in batches)
        self._update(torch.stack((total, norm)), lr, tokens, began)

    def _update(self, numbers: Tensor, lr: float, tokens: int, began: float) -> None:
        before, ready = self._pending, None
        if self.device.type == "cuda":
            host = torch.empty(2, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.step += 1
        self._pending = _Pending(self.step, lr, tokens, began, numbers, ready)
        if ready is None:
            self.settle()  # before it can do harm
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.hold is not None:
            torch.cuda.current_stream().wait_event(self.hold)
            self.hold = None
        self.optimizer.step()
        if ready is not None and before is not None:
            self._look(before)

    def settle(self) -> None:
        """Wait for the last step's numbers. InvalidArgument (LOSS_NOT_FINITE)."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._look(pending)

    def _look(self, pending: _Pending) -> None:
        if pending.ready is not None:
            pending.ready.synchronize()
        self.loss, grad_norm = pending.numbers.tolist()
        if not (math.isfinite(self.loss) and math.isfinite(grad_norm)):
            raise InvalidArgument(
                f"loss {self.loss} and gradient norm {grad_norm} at step {pending.step}: lower optim.lr or look at the "
                "rows; earlier checkpoints are kept",
                reason="LOSS_NOT_FINITE",
                metadata={"step": str(pending.step)},
            )
        now = time.monotonic()
        seconds, self._settled = now - max(pending.began, self._settled), now
        self.tell(Told(pending.step, self.loss, grad_norm, pending.lr, pending.tokens, seconds))

    def _batches(self) -> list[Batch]:
        """The block numbers of each micro-batch of the coming step; the last step of an epoch may be short.

        The cursor is the step itself: order and place follow from it, so nothing else need be saved.
        """
        schedule = self.config.schedule
        epoch, place = divmod(self.step, self.per_epoch)
        per_step = schedule.batch_size * schedule.accumulate
        order = packing.order(len(self.blocks), epoch, schedule.seed)[place * per_step : (place + 1) * per_step]
        return [order[at : at + schedule.batch_size] for at in range(0, len(order), schedule.batch_size)]

    def _most_tokens(self) -> int:
        tokens = self.config.schedule.batch_size * int(self.blocks.ids.shape[1])
        return -(-tokens // ROUND) * ROUND

    def _optimizer_bytes(self) -> int:
        """What the optimizer will still take on the device."""
        return 0 if self.optimizer.state else sum(8 * p.numel() for p in self.parameters)


def rate(step: int, total: int, schedule: ScheduleConfig) -> float:
    """The learning rate of a step (from 0) as a part of the highest: linear warm-up, then a cosine to min_lr_ratio."""
    warm = schedule.warmup_steps or math.ceil(total * schedule.warmup_ratio)
    if step < warm:
        return (step + 1) / warm
    along = (step - warm) / max(1, total - warm)
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * along))


def make_optimizer(config: OptimConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of a config over LoRA weights."""
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    # Paging moves state between GPU and host memory; without a GPU there is nothing to page.
    if config.name == "paged_adamw_32bit" and torch.cuda.is_available():
        from bitsandbytes import optim

        paged: torch.optim.Optimizer = optim.PagedAdamW32bit(parameters, **options)  # type: ignore[attr-defined]  # untyped
        return paged
    return torch.optim.AdamW(parameters, **options, fused=torch.cuda.is_available())
