"""The engine server's wire: messages to token ids by the artifact's template, token ids to text."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from google.protobuf.empty_pb2 import Empty
from prometheus_client import Gauge
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceServicer

from services.common.metrics import Answers
from services.finetune.errors import FailedPrecondition, InvalidArgument, Unavailable, Unimplemented, Violation, blamed
from services.finetune.formats import Tool
from services.finetune.prepare.certificate import META, certify, check
from services.finetune.store import Store
from services.finetune.store.artifacts import load
from services.finetune.templates import Template, load_template, to_prompt_ids
from services.finetune.tokenizer import Tokenizer
from services.finetune.vision import ImageForm
from services.inference.engines.adapters import Adapters, Served
from services.inference.engines.calling import Calling
from services.inference.engines.calls import find_form
from services.inference.engines.images import Images
from services.inference.engines.messages import check_choice, read_tools, read_turns
from services.inference.engines.port import Engine, Likely, Picture
from services.inference.engines.sampling import form_of, read_sampling
from services.inference.engines.stopping import StopText
from services.inference.turns import Turns

COALESCE_S = 0.04
MOST_TEXTS = 256
"""To embed at a time: their vectors fit into one message."""
QUEUE = 1024
"""Answers by one adapter, or by none, that may wait for the engine."""
FINISH = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}


class EngineServicer(InferenceServicer):
    """See the proto: what is about answers is here, what is about endpoints is the inference service's."""

    def __init__(
        self,
        endpoint: str,
        engine: Engine,
        tokenizer: Tokenizer,
        served: Sequence[Served],
        store: Store,
        form: ImageForm | None = None,
    ) -> None:
        """`form` is how the model takes images in, None if it sees none."""
        self._endpoint = endpoint
        self._images = Images(form, store, endpoint)
        self._engine = engine
        self._tokenizer = tokenizer
        self._adapters = Adapters(engine, served, store)
        self._store = store
        self._numbers = Answers()
        loaded = Gauge("quartet_adapters", "Adapters that the engine has loaded.", registry=None)
        loaded.set_function(self._adapters.loaded)
        cache = Gauge("quartet_cache_use", "Part of the memory for keys and values in use.", registry=None)
        cache.set_function(engine.cache_use)
        self.collectors = (*self._numbers.collectors, loaded, cache)
        # By alias: what waits for one adapter does not hold up the others.
        self._turns = Turns(engine.most_answers, engine.most_answers, QUEUE)
        self._load_template = functools.cache(lambda name: load_template(name, tokenizer))
        self._certify = functools.cache(lambda name: certify(tokenizer, self._load_template(name)))
        self._call_form = functools.cache(lambda name: find_form(self._load_template(name), tokenizer.special_texts))

    def CreateEndpoint(self, request: pb.CreateEndpointRequest, context: Any) -> pb.Endpoint:
        raise _elsewhere()

    def GetEndpoint(self, request: pb.GetEndpointRequest, context: Any) -> pb.Endpoint:
        raise _elsewhere()

    def ListEndpoints(self, request: pb.ListEndpointsRequest, context: Any) -> pb.ListEndpointsResponse:
        raise _elsewhere()

    def DeleteEndpoint(self, request: pb.DeleteEndpointRequest, context: Any) -> Empty:
        raise _elsewhere()

    def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Any) -> pb.Endpoint:
        adapter = request.adapter
        served = Served(adapter.alias, adapter.model, adapter.digest, load(self._store, adapter.digest))
        self._adapters.put(served)
        return self._described()

    def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Any) -> pb.Endpoint:
        self._adapters.drop(request.alias)
        return self._described()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async for answer in self._numbers.counted(self._generate(request)):
            yield answer

    async def _generate(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        ids = self._plain(request)
        async with self._turns.turn(request.adapter), self._adapters.using(request.adapter) as served:
            async for answer in self._answer(ids, served, request.sampling, (), pb.GenerateResponse):
                yield answer

    async def Chat(self, request: pb.ChatRequest, context: Any) -> AsyncIterator[pb.ChatResponse]:
        async for answer in self._numbers.counted(self._in_turn(request)):
            yield answer

    async def _in_turn(self, request: pb.ChatRequest) -> AsyncIterator[pb.ChatResponse]:
        async with self._turns.turn(request.adapter), self._adapters.using(request.adapter) as served:
            async for answer in self._chat(served, request):
                yield answer

    async def _chat(self, served: Served, request: pb.ChatRequest) -> AsyncIterator[pb.ChatResponse]:
        template = self._template(served)
        if request.template and request.template != template.name:
            raise FailedPrecondition(
                f"{served.name} was tuned with the template {template.name!r}, not {request.template!r}",
                reason="TEMPLATE_MISMATCH",
                metadata={"template": template.name},
            )
        self._check_parity(served, template)
        tools, choice = read_tools(request.tools), request.tool_choice
        check_choice(choice, tools)
        if choice.mode == pb.ToolChoice.NONE:
            tools = []
        pictures = await asyncio.to_thread(self._images.read, request.messages)
        ids = self._prompt(template, served, request.messages, tools)
        calling = Calling(self._call_form(template.name), request, self._tokenizer.special_ids) if tools else None
        stops = template.stop
        async for answer in self._answer(ids, served, request.sampling, stops, pb.ChatResponse, calling, pictures):
            yield answer

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        if not 1 <= len(request.inputs) <= MOST_TEXTS:
            raise InvalidArgument(
                f"inputs: {len(request.inputs)} are given; give 1 to {MOST_TEXTS}", reason="TEXTS_TOO_MANY"
            )
        ids = [self._embedded(n, given) for n, given in enumerate(request.inputs)]
        async with self._turns.turn(""):
            vectors = await self._engine.embed(ids)
        return pb.EmbedResponse(
            embeddings=[pb.Embedding(values=v) for v in vectors], usage=pb.Usage(prompt_tokens=sum(map(len, ids)))
        )

    def _embedded(self, n: int, given: pb.EmbedInput) -> list[int]:
        """The tokens of a text with those that its tokenizer puts around it."""
        ids = list(given.token_ids.ids)
        if given.text:
            ids = self._tokenizer.backend.encode(given.text, add_special_tokens=True).ids
        field, why, reason = f"inputs[{n}]", "", "PROMPT_EMPTY"
        if not ids or not all(0 <= i < self._engine.vocabulary for i in ids):
            why = "is empty, or holds what is no token"
        elif len(ids) > self._engine.context_length:
            reason = "PROMPT_TOO_LONG"
            why = f"has {len(ids)} tokens, but the model reads {self._engine.context_length}; shorten it"
        if why:
            raise InvalidArgument(f"{field} {why}", reason=reason, violations=[Violation(field, why, reason)])
        return ids

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        served = self._adapters.find(request.adapter)
        if request.WhichOneof("input") == "text":
            return pb.TokenizeResponse(token_ids=self._plain(request))
        template = self._template(served)
        tools = read_tools(request.conversation.tools)
        self._images.read(request.conversation.messages)
        ids = self._prompt(template, served, request.conversation.messages, tools)
        return pb.TokenizeResponse(token_ids=ids, template=template.name)

    def ListServedModels(self, request: pb.ListServedModelsRequest, context: Any) -> pb.ListServedModelsResponse:
        models = [
            pb.ServedModel(
                endpoint=self._endpoint,
                adapter=s.alias,
                model=s.name,
                digest=s.digest,
                context_length=self._engine.context_length,
            )
            for s in self._adapters.all()
        ]
        return pb.ListServedModelsResponse(models=models)

    # ------------------------------------------------------------------------------------------ prompts

    def _described(self) -> pb.Endpoint:
        adapters = [
            pb.ServedAdapter(alias=s.alias, model=s.name, digest=s.digest) for s in self._adapters.all() if s.alias
        ]
        return pb.Endpoint(name=self._endpoint, adapters=adapters, state=pb.Endpoint.READY)

    def _template(self, served: Served) -> Template:
        name = served.manifest.meta["template"]
        if not name:
            raise FailedPrecondition(
                f"{served.name} carries no chat template; use Generate, or import it with one",
                reason="TEMPLATE_MISSING",
            )
        template: Template = self._load_template(name)
        return template

    def _check_parity(self, served: Served, template: Template) -> None:
        """FailedPrecondition (PARITY_MISMATCH) if a chat's tokens here are not what `served` was trained on."""
        trained = served.manifest.meta.get(META)
        if trained is not None:
            check(trained, self._certify(template.name), served.name)

    def _prompt(
        self, template: Template, served: Served, messages: Sequence[pb.Message], tools: Sequence[Tool]
    ) -> list[int]:
        turns, system = read_turns(messages, self._engine.vocabulary), served.manifest.meta["system"]
        images = any(p.HasField("image") for m in messages for p in m.content)
        return self._images.expand(to_prompt_ids(template, self._tokenizer, turns, system, tools, images))

    def _plain(self, request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
        if isinstance(request, pb.GenerateRequest) and request.WhichOneof("prompt") == "token_ids":
            ids = list(request.token_ids.ids)
            wrong = next((n for n, i in enumerate(ids) if not 0 <= i < self._engine.vocabulary), None)
            if wrong is not None:
                why = f"{ids[wrong]} is no token; they are from 0 to {self._engine.vocabulary - 1}"
                field = f"token_ids.ids[{wrong}]"
                # The contract has no reason of its own for this: such a prompt says nothing to the model either.
                raise blamed(field, why, "PROMPT_EMPTY")
        else:
            # Apart: what stands first in a text may get a space before it, as the text does in training.
            opening = self._tokenizer.encode(self._tokenizer.opening)
            ids = [*opening, *self._tokenizer.encode(request.text)] if request.text else []
        if self._images.form is not None and self._images.form.token_id in ids:
            raise InvalidArgument(
                "a prompt without a template shows no image: give images to Chat, and leave their token out",
                reason="IMAGE_MISPLACED",
            )
        if not ids:
            raise InvalidArgument("the prompt is empty; give text or token_ids", reason="PROMPT_EMPTY")
        return ids

    # ------------------------------------------------------------------------------------------ answers

    async def _answer(
        self,
        ids: list[int],
        served: Served,
        wanted: pb.Sampling,
        stops: tuple[str, ...],
        make: Callable[..., Any],
        calling: Calling | None = None,
        images: Sequence[Picture] = (),
    ) -> AsyncIterator[Any]:
        """Stream an answer, several tokens a message when they come fast. A stop text is never sent, not even in part."""
        form = calling.form(wanted) if calling else form_of(wanted)
        stops, engine = (*stops, *wanted.stop), self._engine
        sampling = read_sampling(
            wanted, served, self._tokenizer, len(ids), engine.context_length, engine.vocabulary, stops, form
        )
        text = StopText(self._tokenizer, stops, calling.marks if calling else ())
        pending_text, pending_ids, count, finish = "", [], 0, ""
        likely: list[pb.TokenLogprobs] = []
        calls: list[pb.ToolCall] = []
        last = 0.0  # the first token goes out at once
        steps = self._engine.generate(ids, sampling, served.key, images)
        try:
            async for step in steps:
                count += len(step.ids)
                pending_ids += step.ids
                likely += map(self._likely, step.ids, step.likely)
                new = text.push(step.ids, bool(step.finish))
                finish = "stop" if text.stopped else step.finish
                if calling:
                    new, finish = calling.push(new, finish, calls)
                pending_text += new
                if finish:
                    break
                if time.monotonic() - last >= COALESCE_S:
                    yield make(text=pending_text, token_ids=pending_ids, logprobs=likely, **_told(calls))
                    pending_text, pending_ids, likely, calls = "", [], [], []
                    last = time.monotonic()
        except Unavailable as error:
            yield make(text=pending_text, token_ids=pending_ids, logprobs=likely, **_told(calls))
            raise Unavailable(error.message, reason=error.reason, metadata={"tokens_sent": str(count)}) from error
        finally:
            await steps.aclose()  # type: ignore[attr-defined]  # an async generator, by the port's contract
        usage = pb.Usage(prompt_tokens=len(ids), completion_tokens=count)
        end = {"finish_reason": FINISH[finish], "usage": usage, **_told(calls)}
        yield make(text=pending_text, token_ids=pending_ids, logprobs=likely, **end)

    def _likely(self, token: int, likely: Likely) -> pb.TokenLogprobs:
        def candidate(token: int, logprob: float) -> pb.Candidate:
            return pb.Candidate(
                token_id=token, text=self._tokenizer.decode([token], skip_special=False), logprob=logprob
            )

        top = [candidate(*other) for other in likely.top]
        return pb.TokenLogprobs(chosen=candidate(token, likely.logprob), top=top)


def _elsewhere() -> Unimplemented:
    return Unimplemented(
        "this is an engine server, which only answers; endpoints are the inference service's", reason="UNIMPLEMENTED"
    )


def _told(calls: Sequence[pb.ToolCall]) -> dict[str, Any]:
    """A field that only a chat's answers have."""
    return {"tool_calls": calls} if calls else {}
