"""The training loop: deterministic for a seed, stoppable between any two steps, exact to resume."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from services.finetune.config import TrainRun
from services.finetune.errors import Cancelled
from services.finetune.formats import Message
from services.finetune.prepare.certificate import META, certify
from services.finetune.progress import Attempt, newest_checkpoint
from services.finetune.store.artifacts import load, materialise
from services.finetune.templates import load_template, to_prompt_ids
from services.finetune.tokenizer import Tokenizer
from services.finetune.train import checkpoint
from services.finetune.train.data import prepare
from services.finetune.train.engine import choose
from services.finetune.train.model import choose_dtype, computing, load_model, trainable
from services.finetune.train.step import Stepper, Told


class Trainer:
    """One attempt at one run. `run` is the whole of it; the rest are its acts."""

    def __init__(self, run: TrainRun, attempt: Attempt, stop: threading.Event, workdir: Path) -> None:
        self.order = run
        self.config = run.config
        self.attempt = attempt
        self.stop = stop
        self.workdir = workdir
        self._saved = -1
        """The step of the newest checkpoint, saved or being saved."""
        self._digest: Future[str] = Future()
        self._saver = ThreadPoolExecutor(1, "checkpoint")

    def run(self) -> dict[str, Any]:
        """See services.finetune.train.train."""
        self._load()
        self._resume()
        report, steps = self.config.report, self.steps
        self._began, self._first = time.monotonic(), steps.step
        with self._saver:
            while steps.step < steps.total:
                if self.stop.is_set():
                    self._save().result()
                    raise Cancelled(f"stopped after step {steps.step}; its checkpoint is kept", reason="STOPPED")
                steps.take()
                each = report.checkpoint_epochs * steps.per_epoch
                if steps.step % report.checkpoint_every == 0 or (each and steps.step % each == 0):
                    self._save()
                if report.sample_every and steps.step % report.sample_every == 0 and steps.step < steps.total:
                    self._sample()
                if self._digest.done():
                    self._digest.result()  # a checkpoint that could not be saved ends the run
            digest = self._save().result()
        self._sample()
        return {"checkpoint": digest, "step": steps.step}

    def _load(self) -> None:
        torch.use_deterministic_algorithms(not torch.cuda.is_available())
        store, base = self.attempt.store, load(self.attempt.store, self.order.base.digest)
        folder = materialise(store, base, self.workdir / "base")
        self.tokenizer = Tokenizer.from_files(folder)
        self.template = load_template(self.config.data.template or base.meta["template"], self.tokenizer)
        certificate = certify(self.tokenizer, self.template)
        self.blocks = prepare(self.order, self.template, certificate, folder, self.attempt, self.stop, self.workdir)
        dtype, why = choose_dtype(self.config.model.dtype)
        self._log(f"computing in {str(dtype).removeprefix('torch.')}: {why}")
        self.model = load_model(folder, self.config, dtype)
        self.parameters = trainable(self.model)
        self.device = next(iter(self.parameters.values())).device
        engine, why = choose(self.model, self.blocks, self.device, dtype, self.config.model)
        self._log(f"gradients by {why}")
        self.steps = Stepper(
            self.config, self.model, self.parameters, self.blocks, engine, self._tell, self._log, dtype
        )
        self.dtype = dtype
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
                self.steps.optimizer,
                self.workdir / "resume",
            )
            self.steps.go_on(state)
            self._saved = self.steps.step
            self._digest.set_result(digest)
            self._log(f"going on after step {self.steps.step}")

    def _log(self, text: str) -> None:
        self.attempt.emit("log", level="info", text=text)

    def _tell(self, told: Told) -> None:
        if told.step % self.config.report.log_every and told.step not in (1, self.steps.total):
            return
        pace = (time.monotonic() - self._began) / (told.step - self._first)
        self.attempt.emit(
            "metric",
            step=told.step,
            values={
                "loss": told.loss,
                "lr": told.lr,
                "grad_norm": told.grad_norm,
                "tokens_per_s": told.tokens / told.seconds,
                "epoch": told.step / self.steps.per_epoch,
                "total_steps": self.steps.total,
                "eta_s": pace * (self.steps.total - told.step),
            },
        )

    def _save(self) -> Future[str]:
        """Begin to save the step that was last taken; its digest, once it is stored and known to later attempts."""
        steps = self.steps
        if self._saved != steps.step:
            steps.settle()
            if self._saved >= 0:
                self._digest.result()  # one at a time
            snapshot = checkpoint.snapshot(self.model, self.parameters, steps.optimizer)
            steps.hold, self._saved = snapshot.ready, steps.step
            self._digest = self._saver.submit(self._store, snapshot, steps.state())
        return self._digest

    def _store(self, snapshot: checkpoint.Snapshot, state: dict[str, Any]) -> str:
        step, loss = state["step"], state["loss"]
        folder = self.workdir / f"checkpoint-{step}"
        meta = {**self.meta, "step": step, "loss": loss}
        digest = checkpoint.save(self.attempt.store, self.order, snapshot, state, meta, folder)
        # The store has it; a long run would fill the disk with copies.
        shutil.rmtree(folder)
        self.attempt.checkpoint(step, digest, loss)
        return digest

    def _sample(self) -> None:
        """Let the model answer the recipe's prompts, greedily, and report what it says."""
        self.model.eval()
        system = self.config.report.system or self.config.data.system
        for prompt in self.config.report.prompts:
            ids = to_prompt_ids(self.template, self.tokenizer, [Message("user", prompt)], system)
            prompt_BL = torch.tensor([ids], device=self.device)
            with torch.no_grad(), computing(self.device, self.dtype):
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
            self.attempt.emit("sample", step=self.steps.step, prompt=prompt, answer=answer)
