"""One optimizer step: which blocks, which gradients, which rate. On a GPU the host never waits inside a step."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.finetune import packing
from services.finetune.config import RunConfig
from services.finetune.errors import InvalidArgument, ResourceExhausted, out_of_memory
from services.finetune.packing import Blocks
from services.finetune.train.batch import ROUND
from services.finetune.train.engine import Engine
from services.finetune.train.optim import make_optimizer, rate, state_bytes
from services.finetune.train.parallel import ALONE, Group


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a step once its numbers have reached the host."""

    step: int
    loss: float
    grad_norm: float
    """0 for a step that was skipped."""
    lr: float
    taken: Taken
    seconds: float


@dataclass(frozen=True, slots=True)
class Taken:
    """What a step read."""

    blocks: tuple[int, ...]
    tokens: int
    learned: int
    squares: int
    """The squared lengths of its documents, summed: what attention costs."""
    images: int = 0


@dataclass(slots=True)
class _Pending:
    step: int
    lr: float
    taken: Taken
    began: float
    numbers: Tensor
    """Loss, how many ranks were asked to stop, gradient norm; in host memory once `ready`."""
    ready: Any


class Stepper:
    """A model, its data and its optimizer, one step at a time.

    On a GPU a step's loss is looked at while the next one runs; `settle` waits for it. `tell` hears of every step, in order,
    `log` of what is decided, as (text, level). In float16 gradients are scaled, so that small ones do not vanish; the host
    waits for each step, and one whose gradients overflow is skipped.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Any,
        parameters: dict[str, Tensor],
        blocks: Blocks,
        engine: Engine,
        tell: Callable[[Told], None],
        log: Callable[[str, str], None],
        dtype: torch.dtype = torch.float32,
        group: Group = ALONE,
        stop: threading.Event | None = None,
        dealt: bool = False,
    ) -> None:
        self.config = config
        self.model = model
        self.parameters = list(parameters.values())
        self.blocks = blocks
        self.engine = engine
        self.tell = tell
        self.log = log
        self.group = group
        self.stop = stop or threading.Event()
        self._asked = False
        self.device = self.parameters[0].device
        self.optimizer, told = make_optimizer(config, model, parameters, dealt)
        self.log(told, "info")
        self.scaler = torch.amp.GradScaler(self.device.type) if dtype == torch.float16 else None
        schedule = config.schedule
        self.per_epoch = math.ceil(len(blocks) / schedule.blocks_per_step)
        self.total = schedule.max_steps or self.per_epoch * schedule.epochs
        self.step = 0
        self.loss = 0.0
        """Of the last settled step."""
        self.micro = config.schedule.batch_size
        """Blocks that are computed at once; fewer than batch_size once memory ran out, and then more often."""
        self.spared = False
        """Whether memory ran out before."""
        self.hold: Any = None
        """A CUDA event that the next change of the weights must wait for: something still reads them."""
        self._pending: _Pending | None = None
        self._settled = 0.0

    def take(self) -> None:
        """One step: the mean loss over all its learned tokens, whatever micro-batch they are in.

        ResourceExhausted (OUT_OF_MEMORY) if memory runs out a second time; the first time the step is computed anew by
        halves, from the same weights and seed.
        """
        began, schedule = time.monotonic(), self.config.schedule
        taken = self._coming()
        part = rate(self.step, self.total, schedule)
        # Before the gradients: ZeRO updates the weights while it combines them.
        for group in self.optimizer.param_groups:
            group["lr"] = part * group["peak_lr"]
        total = self._within_memory(taken)
        self._beat()
        numbers = self.group.sum(torch.stack((total, torch.full_like(total, float(self.stop.is_set())))))
        self._await_hold()
        scaler = self.scaler
        unscale = (lambda: scaler.unscale_(self.optimizer)) if scaler else None
        norm = self.engine.combine(self.parameters, self.config.optim.clip_norm, unscale)
        self._update(torch.cat((numbers, norm[None])), part * self.config.optim.lr, taken, began)

    def _within_memory(self, taken: Taken) -> Tensor:
        while True:
            try:
                return self._gradients(taken)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self._spare()
            # Only here is the error gone, and with it what its traceback held.
            free()

    def _gradients(self, taken: Taken) -> Tensor:
        """Backpropagate the coming step; its loss."""
        # Dropout depends on seed and step only: a resumed step draws what the first try drew.
        seed = (self.config.schedule.seed << 32) + (self.group.rank << 24) + self.step + 1
        torch.manual_seed(seed)
        self.model.train()
        if text := self.engine.begin(self._most_tokens(), state_bytes(self.optimizer)):
            self.log(text, "info")
        total = torch.zeros((), device=self.device)
        scale = float(self.scaler.scale(torch.ones_like(total))) if self.scaler else 1.0
        for n, batch in enumerate(self.group.deal(np.array(taken.blocks), self.micro)):
            self._beat()
            total += self.engine.backprop(batch, taken.learned, (seed << 16) + n, scale)
        self.engine.agree()
        return total

    def _spare(self) -> None:
        """Take less memory from now on, once. ResourceExhausted (OUT_OF_MEMORY)."""
        step, at_once = self.step + 1, self.micro
        instead = (self._halve() or self.engine.spare()) if self.engine.repeats and not self.spared else ""
        if not instead:
            again = ", again" if self.spared else ""
            raise ResourceExhausted(
                f"memory ran out at step {step}{again}, with {at_once} blocks of {self.blocks.ids.shape[1]} tokens at a "
                "time; lower schedule.batch_size (and raise schedule.accumulate) or data.max_length, or use the qlora "
                "method",
                reason="OUT_OF_MEMORY",
                metadata={"step": str(step), "blocks_at_once": str(at_once)},
            )
        self.spared = True
        told = f"memory ran out at step {step}: {instead}, for as many in each step as before"
        self.log(told + (", under another draw of dropout" if self.config.lora.dropout else ""), "warning")

    def _halve(self) -> str:
        if self.micro == 1:
            return ""
        self.micro //= 2
        return f"{self.micro} blocks at a time in place of {self.config.schedule.batch_size}"

    def _update(self, numbers: Tensor, lr: float, taken: Taken, began: float) -> None:
        before, ready = self._pending, None
        if self.device.type == "cuda":
            host = torch.empty(3, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.step += 1
        self._pending = _Pending(self.step, lr, taken, began, numbers, ready)
        if ready is None or self.scaler:
            self.settle()  # before it can do harm
        if self.scaler:
            self._step_scaled(self.scaler)
            return
        self.engine.apply(self.optimizer)
        if ready is not None and before is not None:
            self._look(before)

    def _beat(self) -> None:
        # How long the first step takes nobody knows: it may compile kernels.
        self.group.beat(self._settled > 0)

    def _await_hold(self) -> None:
        if self.hold is not None:
            torch.cuda.current_stream().wait_event(self.hold)
            self.hold = None

    @property
    def stopping(self) -> bool:
        """Whether a rank was asked to stop. All ranks hear of it after the same step."""
        return self._asked or (self.group.world == 1 and self.stop.is_set())

    def _step_scaled(self, scaler: torch.amp.GradScaler) -> None:
        scale = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            self.log(
                f"step {self.step} was skipped: its float16 gradients overflowed at a loss scale of {scale:g}, which is "
                f"{scaler.get_scale():g} from now on",
                "warning",
            )

    def state(self) -> dict[str, Any]:
        """The plain numbers that the coming step follows from."""
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler else {}
        return {"step": self.step, "loss": self.loss, "micro": self.micro, "spared": self.spared, **scaler}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.step, self.loss = state["step"], state["loss"]
        self.micro, self.spared = state.get("micro", self.micro), state.get("spared", False)
        if self.scaler and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

    def ahead(self) -> Iterator[int]:
        """The blocks that this rank will read, from the coming step on, in their order."""
        for step in range(self.step, self.total):
            for batch in self.group.deal(self._order(step), self.micro):
                yield from batch.tolist()

    def settle(self) -> None:
        """Wait for the last step's numbers. InvalidArgument (LOSS_NOT_FINITE)."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._look(pending)

    def _look(self, pending: _Pending) -> None:
        if pending.ready is not None:
            pending.ready.synchronize()
        self.loss, asked, grad_norm = pending.numbers.tolist()
        self._asked = asked > 0
        if self.scaler and math.isfinite(self.loss) and not math.isfinite(grad_norm) and self.scaler.get_scale() >= 1:
            grad_norm = 0.0
        if not (math.isfinite(self.loss) and math.isfinite(grad_norm)):
            raise InvalidArgument(
                f"loss {self.loss} and gradient norm {grad_norm} at step {pending.step}: lower optim.lr or look at the "
                "rows; earlier checkpoints are kept",
                reason="LOSS_NOT_FINITE",
                metadata={"step": str(pending.step)},
            )
        now = time.monotonic()
        seconds, self._settled = now - max(pending.began, self._settled), now
        self.tell(Told(pending.step, self.loss, grad_norm, pending.lr, pending.taken, seconds))

    def _coming(self) -> Taken:
        """What the coming step reads; the last step of an epoch may be short.

        The cursor is the step itself: order and place follow from it, so nothing else need be saved.
        """
        blocks, order = self.blocks, self._order(self.step)
        flat = blocks.flat
        members = flat.members[packing.ranges(flat.starts[order], flat.starts[order + 1] - flat.starts[order])]
        sizes = flat.offsets[members + 1] - flat.offsets[members]
        learned = int((blocks.labels[order] >= 0).sum())
        images = sum(len(blocks.images_of(block)) for block in order.tolist()) if blocks.image_files else 0
        return Taken(tuple(order.tolist()), int(sizes.sum()), learned, int((sizes**2).sum()), images)

    def _order(self, step: int) -> packing.Longs:
        """The blocks of a step of all ranks."""
        epoch, place = divmod(step, self.per_epoch)
        per_step = self.config.schedule.blocks_per_step
        order = packing.order(len(self.blocks), epoch, self.config.schedule.seed)
        return order[place * per_step : (place + 1) * per_step]

    def _most_tokens(self) -> int:
        tokens = self.micro * int(self.blocks.ids.shape[1])
        return -(-tokens // ROUND) * ROUND


def free() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
