"""The training loop: deterministic for a seed, stoppable between any two steps, exact to resume."""

from __future__ import annotations

import math
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.finetune import packing
from services.finetune.config import OptimConfig, ScheduleConfig, TrainRun
from services.finetune.errors import Cancelled, InvalidArgument
from services.finetune.formats import Message
from services.finetune.prepare.certificate import META, certify
from services.finetune.progress import Attempt, newest_checkpoint
from services.finetune.store.artifacts import load, materialise
from services.finetune.templates import load_template, to_prompt_ids
from services.finetune.tokenizer import Tokenizer
from services.finetune.train import checkpoint
from services.finetune.train.data import prepare
from services.finetune.train.model import choose_dtype, load_model, summed_loss, trainable


class Trainer:
    """One attempt at one run. `run` is the whole of it; the rest are its acts."""

    def __init__(self, run: TrainRun, attempt: Attempt, stop: threading.Event, workdir: Path) -> None:
        self.order = run
        self.config = run.config
        self.attempt = attempt
        self.stop = stop
        self.workdir = workdir
        self.step = 0
        self.loss = 0.0
        self._saved: tuple[int, str] | None = None

    def run(self) -> dict[str, Any]:
        """See services.finetune.train.train."""
        self._load()
        self._resume()
        schedule, report = self.config.schedule, self.config.report
        per_step = schedule.batch_size * schedule.accumulate
        self.per_epoch = math.ceil(len(self.blocks) / per_step)
        self.total = schedule.max_steps or self.per_epoch * schedule.epochs
        self._began, self._first = time.monotonic(), self.step
        while self.step < self.total:
            if self.stop.is_set():
                self._save()
                raise Cancelled(f"stopped after step {self.step}; its checkpoint is kept", reason="STOPPED")
            self._train_step()
            each = report.checkpoint_epochs * self.per_epoch
            if self.step % report.checkpoint_every == 0 or (each and self.step % each == 0):
                self._save()
            if report.sample_every and self.step % report.sample_every == 0 and self.step < self.total:
                self._sample()
        digest = self._save()
        self._sample()
        return {"checkpoint": digest, "step": self.step}

    def _load(self) -> None:
        torch.use_deterministic_algorithms(not torch.cuda.is_available())
        store, base = self.attempt.store, load(self.attempt.store, self.order.base.digest)
        folder = materialise(store, base, self.workdir / "base")
        self.tokenizer = Tokenizer.from_files(folder)
        self.template = load_template(self.config.data.template or base.meta["template"], self.tokenizer)
        certificate = certify(self.tokenizer, self.template)
        self.blocks = prepare(self.order, self.template, certificate, folder, self.attempt, self.stop, self.workdir)
        dtype, why = choose_dtype(self.config.model.dtype)
        self.attempt.emit("log", level="info", text=f"computing in {str(dtype).removeprefix('torch.')}: {why}")
        self.model = load_model(folder, self.config, dtype)
        self.parameters = trainable(self.model)
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = make_optimizer(self.config.optim, list(self.parameters.values()))
        self.meta = {
            "template": self.template.name,
            "system": self.config.data.system,
            "method": self.config.method,
            "base_name": self.order.base.name,
            "architecture": base.meta["architecture"],
            META: certificate,
        }

    def _resume(self) -> None:
        """Go on from what earlier attempts saved, else from the checkpoint that the order names."""
        own = newest_checkpoint(self.attempt.store, self.attempt.job_key, self.attempt.number)
        digest = own[1] if own else self.order.resume.digest if self.order.resume else ""
        if digest:
            state = checkpoint.restore(
                self.attempt.store,
                digest,
                self.order,
                self.model,
                self.parameters,
                self.optimizer,
                self.workdir / "resume",
            )
            self.step, self.loss = state["step"], state["loss"]
            self._saved = (self.step, digest)
            self.attempt.emit("log", level="info", text=f"going on after step {self.step}")

    def _batches(self) -> list[np.ndarray[Any, Any]]:
        """The block numbers of each micro-batch of the coming step; the last step of an epoch may be short.

        The cursor is the step itself: order and place follow from it, so nothing else need be saved.
        """
        schedule = self.config.schedule
        epoch, place = divmod(self.step, self.per_epoch)
        per_step = schedule.batch_size * schedule.accumulate
        order = packing.order(len(self.blocks), epoch, schedule.seed)[place * per_step : (place + 1) * per_step]
        return [order[at : at + schedule.batch_size] for at in range(0, len(order), schedule.batch_size)]

    def _train_step(self) -> None:
        """One optimizer step: the mean loss over all its learned tokens, whatever micro-batch they are in."""
        began = time.monotonic()
        optim, schedule = self.config.optim, self.config.schedule
        # Dropout depends on seed and step only: a resumed step draws what the first try drew.
        torch.manual_seed((schedule.seed << 32) + self.step + 1)
        batches = self._batches()
        learned = sum(int((self.blocks.labels[b] >= 0).sum()) for b in batches)
        self.model.train()
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = summed_loss(self.model, *self._tensors(batch)) / learned
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), optim.clip_norm or math.inf)
        lr = optim.lr * rate(self.step, self.total, schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.loss, grad_norm = torch.stack((total, norm)).tolist()
        if not (math.isfinite(self.loss) and math.isfinite(grad_norm)):
            raise InvalidArgument(
                f"loss {self.loss} and gradient norm {grad_norm} at step {self.step + 1}: lower optim.lr or look at the "
                "rows; earlier checkpoints are kept",
                reason="LOSS_NOT_FINITE",
                metadata={"step": str(self.step + 1)},
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step % self.config.report.log_every == 0 or self.step in (1, self.total):
            tokens = sum(int((self.blocks.segments[b] > 0).sum()) for b in batches)
            self._tell(lr, grad_norm, tokens / (time.monotonic() - began))

    def _tensors(self, batch: np.ndarray[Any, Any]) -> list[Tensor]:
        """ids, labels, positions, segments of blocks; labels stay in host memory (see summed_loss)."""
        arrays = (self.blocks.ids, self.blocks.labels, self.blocks.positions, self.blocks.segments)
        ids, labels, positions, segments = (torch.from_numpy(np.array(a[batch])).long() for a in arrays)
        if self.device.type == "cuda":
            # Only from pinned memory does a copy not wait for the GPU.
            ids, positions, segments = (
                t.pin_memory().to(self.device, non_blocking=True) for t in (ids, positions, segments)
            )
        return [ids, labels, positions, segments]

    def _tell(self, lr: float, grad_norm: float, tokens_per_s: float) -> None:
        pace = (time.monotonic() - self._began) / (self.step - self._first)
        self.attempt.emit(
            "metric",
            step=self.step,
            values={
                "loss": self.loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens_per_s": tokens_per_s,
                "epoch": self.step / self.per_epoch,
                "total_steps": self.total,
                "eta_s": pace * (self.total - self.step),
            },
        )

    def _save(self) -> str:
        if self._saved is None or self._saved[0] != self.step:
            folder = self.workdir / f"checkpoint-{self.step}"
            digest = checkpoint.save(
                self.attempt.store,
                self.order,
                self.model,
                self.parameters,
                self.optimizer,
                {"step": self.step, "loss": self.loss},
                {**self.meta, "step": self.step, "loss": self.loss},
                folder,
            )
            # The store has it; a long run would fill the disk with copies.
            shutil.rmtree(folder)
            self.attempt.checkpoint(self.step, digest, self.loss)
            self._saved = (self.step, digest)
        return self._saved[1]

    def _sample(self) -> None:
        """Let the model answer the recipe's prompts, greedily, and report what it says."""
        self.model.eval()
        system = self.config.report.system or self.config.data.system
        for prompt in self.config.report.prompts:
            ids = to_prompt_ids(self.template, self.tokenizer, [Message("user", prompt)], system)
            prompt_BL = torch.tensor([ids], device=self.device)
            with torch.no_grad():
                out_BL = self.model.generate(
                    input_ids=prompt_BL,
                    attention_mask=torch.ones_like(prompt_BL),
                    max_new_tokens=self.config.report.sample_tokens,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=list(self.tokenizer.eos_ids),
                    pad_token_id=(self.tokenizer.eos_ids or (0,))[0],
                )
            answer = self.tokenizer.decode(out_BL[0, len(ids) :].tolist())
            self.attempt.emit("sample", step=self.step, prompt=prompt, answer=answer)


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
