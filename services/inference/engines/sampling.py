"""How an answer is drawn: by what the caller asks for, and what the model says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import FailedPrecondition, InvalidArgument, Violation
from services.finetune.tokenizer import Tokenizer
from services.inference.engines.adapters import Served
from services.inference.engines.forms import check_form
from services.inference.engines.port import Form, Sampling

DEFAULT_TOKENS = 512
MOST_BIASED = 300
"""As in OpenAI's API."""


def read_sampling(
    wanted: pb.Sampling,
    served: Served,
    tokenizer: Tokenizer,
    prompt: int,
    whole: int,
    vocabulary: int,
    stops: Sequence[str],
    form: Form | None,
) -> Sampling:
    """What the caller asks for, over what the model says of itself, over greedy; `prompt` of `whole` tokens are taken.

    InvalidArgument (PROMPT_TOO_LONG, SAMPLING_INVALID, and check_form's); FailedPrecondition (MODEL_NOT_SERVABLE).
    """
    room = whole - prompt
    if room < 1:
        raise InvalidArgument(
            f"the prompt has {prompt} tokens, but prompt and answer together may have {whole}; shorten it",
            reason="PROMPT_TOO_LONG",
            metadata={"prompt_tokens": str(prompt), "context_length": str(whole)},
        )
    own = {k: v for k, v in served.manifest.meta["generation"].items() if v is not None}
    given = {f.name: v for f, v in wanted.ListFields() if f.name != "stop"}
    if not own.get("do_sample", False):
        own["temperature"] = 0.0

    def pick(name: str, default: float) -> float:
        return float(given.get(name, own.get(name, default)))

    sampling = Sampling(
        temperature=pick("temperature", 1.0),
        top_p=pick("top_p", 1.0),
        top_k=int(pick("top_k", 0)),
        max_tokens=min(int(given.get("max_tokens", DEFAULT_TOKENS)), room),
        repetition_penalty=pick("repetition_penalty", 1.0),
        seed=wanted.seed if wanted.HasField("seed") else None,
        eos_ids=_ends(tokenizer, own, stops, form is not None),
        logprobs=wanted.logprobs if wanted.HasField("logprobs") else None,
        form=form,
        frequency_penalty=wanted.frequency_penalty,
        presence_penalty=wanted.presence_penalty,
        min_p=wanted.min_p,
        logit_bias=dict(wanted.logit_bias),
    )
    check_sampling(sampling, vocabulary)
    if sampling.form:
        check_form(sampling.form)
        if not sampling.eos_ids:
            raise FailedPrecondition(
                f"{served.name} knows no end token, so an answer could not end when its form is complete",
                reason="MODEL_NOT_SERVABLE",
            )
    return sampling


def _ends(tokenizer: Tokenizer, own: Mapping[str, Any], stops: Sequence[str], formed: bool) -> tuple[int, ...]:
    """Tokens that end an answer: the model's, and stops that are special tokens, which never come out as text.

    What has a form also ends by the tokenizer's own end token, the only one that is allowed after it.
    """
    special = [s for s in stops if s in tokenizer.special_texts]
    ends = {*own["eos_token_id"], *(tokenizer.encode(s)[0] for s in special)}
    return tuple(sorted(ends | set(tokenizer.eos_ids if formed else ())))


def form_of(wanted: pb.Sampling) -> Form | None:
    """The form that an answer is asked in."""
    kind = wanted.WhichOneof("form")
    return Form(kind, getattr(wanted, kind)) if kind else None


def check_sampling(s: Sampling, vocabulary: int) -> None:
    """InvalidArgument (SAMPLING_INVALID) blaming each field that is out of its range."""
    bias = s.logit_bias
    rules = {
        "temperature": (0 <= s.temperature <= 10, "must be from 0 to 10"),
        "top_p": (0 < s.top_p <= 1, "must be above 0 and at most 1"),
        "top_k": (s.top_k >= 0, "must not be negative"),
        "max_tokens": (s.max_tokens >= 1, "must be at least 1"),
        "repetition_penalty": (0 < s.repetition_penalty <= 10, "must be above 0 and at most 10"),
        "logprobs": (0 <= (s.logprobs or 0) <= 20, "must be from 0 to 20"),
        "frequency_penalty": (-2 <= s.frequency_penalty <= 2, "must be from -2 to 2"),
        "presence_penalty": (-2 <= s.presence_penalty <= 2, "must be from -2 to 2"),
        "min_p": (0 <= s.min_p <= 1, "must be from 0 to 1"),
        "logit_bias": (
            len(bias) <= MOST_BIASED and all(0 <= i < vocabulary and -100 <= b <= 100 for i, b in bias.items()),
            f"must be from -100 to 100 for {MOST_BIASED} tokens at most, which are from 0 to {vocabulary - 1}",
        ),
    }
    wrong = [Violation(f"sampling.{k}", why, "SAMPLING_INVALID") for k, (good, why) in rules.items() if not good]
    if wrong:
        said = "; ".join(f"{v.field} {v.message}" for v in wrong)
        raise InvalidArgument(said, reason="SAMPLING_INVALID", violations=wrong)
