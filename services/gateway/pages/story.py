"""What a training job told so far, as a page shows it: losses, answers to prompts, lines."""

from __future__ import annotations

import html
from collections import deque
from dataclasses import dataclass, field
from itertools import groupby

from quartet.training.v1 import training_pb2 as pb

from services.client.show import event_line
from services.common.status import from_status
from services.gateway.pages.curve import svg

LINES = 200
MOST_SAMPLES = 60
ENDED = (pb.TrainingJob.SUCCEEDED, pb.TrainingJob.FAILED, pb.TrainingJob.CANCELLED)


@dataclass
class Story:
    """`add` its events in their order."""

    steps: dict[str, dict[int, float]] = field(default_factory=lambda: {"training": {}, "validation": {}})
    """Loss by step; an attempt that repeats steps tells the same."""
    samples: dict[tuple[int, str], str] = field(default_factory=dict)
    """Answers by (step, prompt)."""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LINES))
    last: dict[str, float] = field(default_factory=dict)

    def add(self, event: pb.TrainingEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "metric":
            values, step = event.metric.values, event.metric.step
            for name, curve in (("loss", "training"), ("validation_loss", "validation")):
                if name in values:
                    self.steps[curve][step] = values[name]
            if "loss" in values:
                self.last = {"step": step, **values}
        elif kind == "sample":
            self.samples[event.sample.step, event.sample.prompt] = event.sample.answer
        self.lines.append(event_line(event))

    def curve(self) -> str:
        return svg({of: sorted(losses.items()) for of, losses in self.steps.items()})

    def answers(self) -> str:
        """The newest answers by prompt, as HTML."""
        newest = sorted(self.samples.items(), key=lambda s: (s[0][1], -s[0][0]))[:MOST_SAMPLES]
        if not newest:
            return "<p>None yet: report.prompts and report.sample_every of the run's config ask for them.</p>"
        told = ""
        for prompt, answers in groupby(newest, key=lambda s: s[0][1]):
            said = "".join(f"<dt>step {step}</dt><dd>{html.escape(text)}</dd>" for (step, _), text in answers)
            told += f'<section class="told"><h4>{html.escape(prompt)}</h4><dl>{said}</dl></section>'
        return told


def heading(job: pb.TrainingJob, last: dict[str, float]) -> str:
    """State and progress of a job, as HTML; `last` are its newest numbers."""
    state = pb.TrainingJob.State.Name(job.state)
    step, total = int(last.get("step", job.progress.step)), int(last.get("total_steps", job.progress.total_steps))
    told = [f'<b class="state {state.lower()}">{state}</b>']
    told += [f"step {step:,} of {total:,}"] if total else []
    told += [f"loss {last.get('loss', job.progress.loss):.4f}"] if step else []
    if job.state not in ENDED and last:
        told += [f"{last.get('tokens_per_s', 0):,.0f} tokens/s", f"{last.get('eta_s', 0):,.0f} s left"]
    told += [f"attempt {job.attempt}"] if job.attempt > 1 else []
    bar = f'<progress max="{total}" value="{step}"></progress>' if total else ""
    error = f'<p class="error">{html.escape(from_status(job.error).message)}</p>' if job.HasField("error") else ""
    result = f"<p>Result: <code>{html.escape(job.result)}</code></p>" if job.result else ""
    return f"<p>{' · '.join(told)}</p>{bar}{error}{result}"
