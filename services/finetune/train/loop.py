"""The training loop: deterministic for a seed, stoppable between any two steps, exact to resume."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from services.finetune.config import override
from services.finetune.errors import Cancelled, InvalidArgument, QuartetError
from services.finetune.orders import TrainRun
from services.finetune.prepare.certificate import META, certify
from services.finetune.progress import Attempt, best_checkpoint, checkpoints
from services.finetune.store.artifacts import load, materialise
from services.finetune.templates import load_template
from services.finetune.tokenizer import Tokenizer
from services.finetune.train import checkpoint
from services.finetune.train.answers import Answers, shown
from services.finetune.train.data import prepare
from services.finetune.train.engine import Engine, choose
from services.finetune.train.flops import cost, peak, peak_memory
from services.finetune.train.images import Images, Look, come_again
from services.finetune.train.memory import give_back, planned, recompute
from services.finetune.train.model import causal_of, choose_dtype, trainable
from services.finetune.train.parallel import ALONE, Group
from services.finetune.train.report import Report, Silent
from services.finetune.train.stage import choose_stage, load_base
from services.finetune.train.step import Stepper, Told
from services.finetune.train.steplog import NAME, Replay, StepLog, read_lines
from services.finetune.train.validation import Looks, mean_loss
from services.finetune.vision import ImageForm, read_form

if TYPE_CHECKING:
    from services.finetune.train.zero import Zero


class Trainer:
    """One attempt at one run. `run` is the whole of it; the rest are its acts."""

    def __init__(
        self, run: TrainRun, attempt: Attempt, stop: threading.Event, workdir: Path, group: Group = ALONE
    ) -> None:
        self.order = run
        self.config = run.config
        self.attempt = attempt
        self.stop = stop
        self.group = group
        self.workdir = group.shared_folder(workdir)
        self.report = Report(run, attempt, self.workdir) if group.speaks else Silent(attempt, group.rank)
        self.log = StepLog()
        self.looks = Looks()
        self.replay = Replay()
        self._saved = -1
        """The step of the newest checkpoint, saved or being saved."""
        self._digest: Future[str] = Future()
        self._known = group.from_first(lambda: checkpoints(attempt.store, attempt.job_key, attempt.number))
        """What was said of the job's complete checkpoints, by step."""
        self._saver = ThreadPoolExecutor(1, "checkpoint")
        self.images: Images | None = None

    def run(self) -> dict[str, Any]:
        """See services.finetune.train.train."""
        result: dict[str, Any] = {}
        state = "FAILED"
        try:
            result = self._run()
            state = "SUCCEEDED"
        except Cancelled:
            state = "CANCELLED"
            raise
        except InvalidArgument as error:
            raise self._with_last(error) from error
        finally:
            self._close(state)
            if self.images is not None:
                self.images.close()
        return result

    def _run(self) -> dict[str, Any]:
        self._load()
        self._resume()
        if self.images is not None:
            self.images.expect(self.data.blocks, self.steps.ahead())
        self._began, self._first = time.monotonic(), self.steps.step
        with self._saver:
            if message := self._train():
                self.report.log(message)
            self._save().result()
        held, plan = (size / 2**20 for size in (peak_memory(self.device), self.planned))
        self.report.log(f"peak memory {held:,.0f} MiB{f', planned {plan:,.0f} MiB' if plan else ''}")
        self._sample()
        if not self.group.speaks:
            return {}
        best = best_checkpoint(self._known.values()) if self.config.report.keep_best else None
        kept = best or self._known[self.steps.step]
        return {"checkpoint": kept["digest"], "step": kept["step"], "message": message}

    def _train(self) -> str:
        """All steps that are left; why there were fewer than planned, or ""."""
        report, steps, began = self.config.report, self.steps, self.steps.step
        while True:
            step, last = steps.step, steps.step >= steps.total
            if self._look_due(step, last) and self._look() and report.keep_best:
                self._save()
            ended = self._ended_early()
            if step > began:
                each = report.checkpoint_epochs * steps.per_epoch
                if step % report.checkpoint_every == 0 or (each and step % each == 0):
                    self._save()
                if report.sample_every and step % report.sample_every == 0 and not (last or ended):
                    self._sample()
            if self._digest.done():
                self._digest.result()  # a checkpoint that could not be saved ends the run
            if (last or ended) and not self._look_due(step, last):
                return ended
            self._check_stop()
            steps.take()

    def _check_stop(self) -> None:
        """Cancelled (STOPPED) if that is asked, after what was learned is saved."""
        if not self.steps.stopping:
            return
        step = self.steps.step
        if step == 0:
            raise Cancelled("stopped before the first step", reason="STOPPED")
        self._save().result()
        raise Cancelled(f"stopped after step {step}; its checkpoint is kept", reason="STOPPED")

    # ------------------------------------------------------------------------------------------ before the first step

    def _load(self) -> None:
        fixed = self.config.schedule.deterministic or not torch.cuda.is_available()
        torch.use_deterministic_algorithms(fixed)
        if fixed:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
        if not torch.cuda.is_available():
            give_back()
        store, base = self.attempt.store, load(self.attempt.store, self.order.base.digest)
        folder = self.workdir / "base"
        self.group.once(lambda: materialise(store, base, folder))
        self._begin_nothing_more()
        self.tokenizer = Tokenizer.from_files(folder)
        self.template = load_template(self.config.data.template or base.meta["template"], self.tokenizer)
        certificate = certify(self.tokenizer, self.template)
        self.data = prepare(
            self.order, self.template, certificate, folder, self.attempt, self.stop, self.workdir, self.group
        )
        if self.group.speaks:
            self.attempt.emit("dataset", **self.data.about)
        self._begin_nothing_more()
        dtype, why = choose_dtype(self.config.model.dtype)
        self.report.log(f"computing in {str(dtype).removeprefix('torch.')}: {why}")
        self.model, self.dealt = load_base(folder, self.config, dtype, fixed, self.group, self.report.log)
        self.parameters = trainable(self.model)
        self.device = next(iter(self.parameters.values())).device
        form = read_form(folder)
        asked = shown(self.config, self.order.datasets, store, form, self.workdir / f"shown-{self.group.rank}")
        about = (self.tokenizer, asked, form, self.device, dtype)
        self.answers = Answers(self.model, self.config, self.template, *about)
        blocks = self.data.blocks
        longest = max((int(b.ids.shape[1]) for b in self.data.validation), default=0)
        self.engine, why = self._engine(dtype, longest, fixed, form)
        kept = self.images is not None and self.images.kept is not None
        self.cost, self.peak = cost(self.model, kept), peak(self.device, dtype)
        if self.cost and self.peak:
            self.report.log(f"MFU is of {self.peak / 1e12:.0f} TFLOP/s, the device's dense 16-bit peak")
        self.report.log(f"gradients by {why}")
        self.steps = Stepper(
            self.config,
            self.model,
            self.parameters,
            blocks,
            self.engine,
            self._tell,
            self.report.log,
            dtype,
            self.group,
            self.stop,
            dealt=self.zero is not None,
        )
        if self.zero is not None:
            self.steps.optimizer = self.zero.start(self.steps.optimizer)
        config = override(self.config, {"parallel.processes": self.group.world, "parallel.nodes": 1})
        self.planned = planned(folder, config, blocks, self.steps.total, self.device, dtype)
        self.meta = {
            "template": self.template.name,
            "system": self.config.data.system,
            "method": self.config.method,
            "base_name": self.order.base.name,
            "architecture": base.meta["architecture"],
            META: certificate,
        }

    def _engine(self, dtype: torch.dtype, longest: int, fixed: bool, form: ImageForm | None) -> tuple[Engine, str]:
        self.zero: Zero | None = None
        stage, why = ("", "") if self.dealt else choose_stage(self.config, self.model, self.group)
        sets = (self.data.blocks, *self.data.validation)
        if form is not None and any(blocks.image_files for blocks in sets):
            look = Look(self.device, dtype, fixed=fixed, inside="zero3" in stage, again=come_again(sets, self.config))
            folder = self.workdir / f"images-{self.group.rank}"
            self.images = Images(causal_of(self.model), form, self.attempt.store, folder, look, self.group.local_world)
        if stage:
            from services.finetune.train.zero import Zero, settings_of

            trainable = sum(p.numel() for p in self.parameters.values())
            settings = settings_of(stage, self.config.optim.clip_norm, trainable)
            self.zero = Zero(self.model, self.data.blocks, self.device, self.group, settings, dtype, self.images)
            twice = recompute(causal_of(self.model), self.config.model, self.device)
            return self.zero, f"torch's autograd, by {stage} over {self.group.world} processes ({why}); {twice}"
        model, blocks, wanted = self.model, self.data.blocks, self.config.model
        shared = (self.group, self.images, self.dealt)
        engine, how = choose(model, blocks, self.device, dtype, wanted, longest, fixed, *shared)
        return engine, how + (f"; {why}" if why else "")

    def _begin_nothing_more(self) -> None:
        """Cancelled (STOPPED) while there is nothing to save."""
        if self.group.from_first(self.stop.is_set):
            raise Cancelled("stopped before the first step", reason="STOPPED")

    def _resume(self) -> None:
        """Go on from what earlier attempts saved, else from the checkpoint that the order names."""
        own = self._known[max(self._known)] if self._known else None
        digest = own["digest"] if own else self.order.resume.digest if self.order.resume else ""
        if not digest:
            return
        folder = self.workdir / f"resume-{self.group.rank}"
        state = checkpoint.restore(
            self.attempt.store,
            digest,
            self.order,
            self.model,
            self.parameters,
            self.steps.optimizer,
            folder,
            self.zero,
        )
        self.steps.go_on(state)
        if (folder / NAME).exists():
            self.log = StepLog(read_lines(folder / NAME))
        if own:
            self.looks = Looks(**state.get("looks", {}))
            self._saved = self.steps.step
            self._digest.set_result(digest)
            if self.group.speaks:
                self.replay = Replay.of(self.attempt, self.steps.step)
            if "report" in own:
                self.report.recall(own["report"], self.steps.step)
        self.report.log(f"going on after step {self.steps.step}")

    # ------------------------------------------------------------------------------------------ numbers

    def _tell(self, told: Told) -> None:
        self.log.add(told)
        if found := self.replay.add(told):
            self.report.warn(
                f"{found}: sums are not in a fixed order on this device, so it goes on near to that attempt"
            )
        if told.step % self.config.report.log_every and told.step not in (1, self.steps.total):
            return
        pace, taken = (time.monotonic() - self._began) / (told.step - self._first), told.taken
        values = {
            "loss": told.loss,
            "lr": told.lr,
            "grad_norm": told.grad_norm,
            "tokens_per_s": taken.tokens / told.seconds,
            "epoch": told.step / self.steps.per_epoch,
            "total_steps": self.steps.total,
            "eta_s": pace * (self.steps.total - told.step),
            "peak_memory_bytes": peak_memory(self.device),
        }
        if self.cost and self.peak:
            flops = self.cost.flops(taken.tokens, taken.learned, taken.squares, taken.images)
            values["mfu"] = flops / told.seconds / self.peak
        if taken.images:
            values["images_per_s"] = taken.images / told.seconds
        self.report.metric(told.step, values)

    def _look_due(self, step: int, last: bool) -> bool:
        every = self.config.validation.every or self.steps.per_epoch
        return bool(self.data.validation) and step != self.looks.step and step > 0 and (last or step % every == 0)

    def _look(self) -> bool:
        """Tell the validation loss; whether it is the least so far. When stopped meanwhile, it is looked at on resume."""
        self.steps.settle()
        began, step = time.monotonic(), self.steps.step
        loss = mean_loss(self.engine, self.data.validation, self.steps.micro, self.stop, self.group)
        if loss is None:
            return False
        values = {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}
        self.report.metric(step, values | {"validation_seconds": time.monotonic() - began})
        return self.looks.add(step, loss, self.config.validation.min_delta)

    def _ended_early(self) -> str:
        looks, patience = self.looks, self.config.validation.patience
        if not patience or looks.stale < patience:
            return ""
        return (
            f"ended early after step {self.steps.step} of {self.steps.total}: the validation loss was not below "
            f"{looks.bar:.6g} in {looks.stale} looks"
        )

    # ------------------------------------------------------------------------------------------ what is kept

    def _save(self) -> Future[str]:
        """Begin to save the step that was last taken; its digest, once it is stored and known to later attempts."""
        steps = self.steps
        if self._saved != steps.step:
            steps.settle()
            if self._saved >= 0:
                self._digest.result()  # one at a time
            self._saved = steps.step
            self.group.beat(False)
            if not self.group.speaks and self.zero is None:
                self._digest = _done("")
                return self._digest
            snapshot = checkpoint.snapshot(self.model, self.parameters, steps.optimizer, self.zero)
            steps.hold = snapshot.ready
            if not self.group.speaks:
                self._digest = _done("")
                return self._digest
            state = {**steps.state(), "looks": dataclasses.asdict(self.looks)}
            self._digest = self._saver.submit(self._store, snapshot, state, self.log.upto(), self._summary("RUNNING"))
        return self._digest

    def _store(
        self, snapshot: checkpoint.Snapshot, state: dict[str, Any], lines: tuple[str, ...], summary: dict[str, Any]
    ) -> str:
        step, loss, looks = state["step"], state["loss"], state["looks"]
        told = {"validation_loss": looks["loss"]} if looks["step"] == step else {}
        folder = self.workdir / f"checkpoint-{step}"
        meta = {**self.meta, "step": step, "loss": loss, **told}
        digest = checkpoint.save(self.attempt.store, self.order, snapshot, state, meta, lines, folder)
        # The store has it; a long run would fill the disk with copies.
        shutil.rmtree(folder)
        told["report"] = self.report.write(lines, summary, last=False)
        self.attempt.checkpoint(step, digest, loss, **told)
        self._known[step] = {"step": step, "digest": digest, "loss": loss, **told}
        return digest

    def _with_last(self, error: InvalidArgument) -> InvalidArgument:
        """A loss that is not finite, with the checkpoint before it."""
        if error.reason == "LOSS_NOT_FINITE" and self._known:
            last = max(self._known)
            told = f"{error.message}; the last good checkpoint is of step {last}"
            metadata = {**error.metadata, "checkpoint_step": str(last)}
            return InvalidArgument(told, reason=error.reason, metadata=metadata)
        return error

    def _summary(self, state: str) -> dict[str, Any]:
        steps, looks, parted = self.steps, self.looks, self.replay.parted
        return {
            "job": self.order.job,
            "state": state,
            "attempt": self.attempt.number,
            "step": steps.step,
            "total_steps": steps.total,
            "loss": steps.loss,
            "validation_loss": looks.loss,
            "least_validation_loss": looks.best,
            "data": dict(self.data.about),
            "blocks_at_once": steps.micro,
            "peak_flops_per_s": self.peak,
            "replayed_steps": self.replay.steps,
            "first_difference": dataclasses.asdict(parted) if parted else None,
        }

    def _close(self, state: str) -> None:
        """Leave the report; that it cannot be left must not hide how the run ended."""
        if not hasattr(self, "steps"):
            return  # there was nothing to report of
        with contextlib.suppress(QuartetError, OSError):
            self.report.close(self.log.upto(), self._summary(state))

    def _sample(self) -> None:
        """Let the model answer the recipe's prompts, greedily, and report what it says."""
        # Where the weights are dealt out, all ranks answer together, and none may leave early.
        together = self.engine.dealt
        if not (self.group.speaks or together):
            return
        self.group.beat(False)
        for prompt, answer in self.answers.ask(self.stop.is_set, together):
            self.report.sample(self.steps.step, prompt, answer)


def _done(digest: str) -> Future[str]:
    done: Future[str] = Future()
    done.set_result(digest)
    return done
