"""What the tests of this room share: requests in a line, and reading errors as the client does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceStub

from tests.inference.published import WORKSPACE

SYSTEM, USER, ASSISTANT = pb.Message.SYSTEM, pb.Message.USER, pb.Message.ASSISTANT
GREEDY = pb.Sampling(temperature=0, max_tokens=12)


def endpoint(stub: InferenceStub, name: str, model: str = "tiny", **given: Any) -> pb.Endpoint:
    """Create one. `one=...` and the like in `adapters` are aliases of models."""
    adapters = [
        pb.ServedAdapter(alias=alias, model=f"{WORKSPACE}/models/{m}") for alias, m in given.pop("adapters", ())
    ]
    request = {key: given.pop(key) for key in ("request_id", "validate_only") if key in given}
    wanted = pb.Endpoint(model=f"{WORKSPACE}/models/{model}", adapters=adapters, **given)
    return stub.CreateEndpoint(pb.CreateEndpointRequest(parent=WORKSPACE, endpoint_id=name, endpoint=wanted, **request))


def turns(*said: str | tuple[pb.Message.Role.ValueType, str]) -> list[pb.Message]:
    """Messages; a bare text is the user's."""
    pairs = [(USER, s) if isinstance(s, str) else s for s in said]
    return [pb.Message(role=role, content=[pb.Part(text=text)]) for role, text in pairs]


def whole(answers: Iterable[pb.ChatResponse | pb.GenerateResponse]) -> tuple[str, list[int], Any]:
    """(text, ids, last message) of a stream."""
    found = list(answers)
    assert all(a.finish_reason == pb.FINISH_REASON_UNSPECIFIED for a in found[:-1])
    return "".join(a.text for a in found), [i for a in found for i in a.token_ids], found[-1]
