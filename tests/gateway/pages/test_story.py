"""A job's events as the page tells them."""

from __future__ import annotations

from quartet.training.v1 import training_pb2 as pb

from services.common.status import to_status
from services.finetune.errors import ResourceExhausted
from services.gateway.pages.story import Story, heading


def metric(step: int, **values: float) -> pb.TrainingEvent:
    told = {"lr": 1e-3, "tokens_per_s": 50, "total_steps": 20, "eta_s": 9} if "loss" in values else {}
    return pb.TrainingEvent(metric=pb.Metric(step=step, values={**told, **values}))


def test_losses_make_two_curves_and_a_step_told_twice_is_one() -> None:
    story = Story()
    validation = metric(10, validation_loss=1.5, validation_perplexity=4.5, validation_seconds=1)
    for event in (metric(5, loss=3.0), metric(10, loss=2.0), validation, metric(10, loss=2.0)):
        story.add(event)
    assert story.steps == {"training": {5: 3.0, 10: 2.0}, "validation": {10: 1.5}}
    assert "training, step 5: 3.0000" in story.curve() and "validation, step 10: 1.5000" in story.curve()
    assert len(story.lines) == 4


def test_answers_are_told_by_prompt_newest_first_and_as_text() -> None:
    story = Story()
    assert "None yet" in story.answers()
    for step, answer in ((10, "<b>old</b>"), (20, "new")):
        story.add(pb.TrainingEvent(sample=pb.Sample(step=step, prompt="Who?", answer=answer)))
    told = story.answers()
    assert told.count("<h4>Who?</h4>") == 1
    assert told.index("step 20") < told.index("step 10") and "&lt;b&gt;old" in told


def test_a_heading_tells_state_and_progress() -> None:
    story = Story()
    story.add(metric(5, loss=3.0))
    running = heading(pb.TrainingJob(state=pb.TrainingJob.RUNNING, attempt=2), story.last)
    assert all(word in running for word in ("RUNNING", "step 5 of 20", "loss 3.0000", "9 s left", "attempt 2"))
    assert '<progress max="20" value="5">' in running
    error = to_status(ResourceExhausted("no <room>", reason="OUT_OF_MEMORY"))
    failed = heading(pb.TrainingJob(state=pb.TrainingJob.FAILED, error=error), {})
    assert "no &lt;room&gt;" in failed and "left" not in failed
