"""One answer that may call tools: the form that is forced on it, and its calls as the wire has them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import InvalidArgument, Violation, blamed
from services.inference.engines.calls import CallForm, CallReader, grammar
from services.inference.engines.forms import check_form
from services.inference.engines.port import Form


class Calling:
    """`marks` are the special tokens that the answer's text must show."""

    def __init__(self, form: CallForm, request: pb.ChatRequest, special_ids: Mapping[str, int]) -> None:
        self._form = form
        self._tools = list(request.tools)
        self._choice = request.tool_choice
        self._special_ids = special_ids
        self._reader = CallReader(form, {t.name for t in self._tools})
        self.marks = [s for s in special_ids if any(s in text for text in form.texts)]

    def form(self, wanted: pb.Sampling) -> Form | None:
        """What is forced: a call where one is demanded, calls that keep their schemas where tools are strict, and answers
        without calls of the form that is asked for. InvalidArgument (TOOLS_INVALID, FORM_INVALID)."""
        forced = self._choice.mode == pb.ToolChoice.REQUIRED
        asked = wanted.WhichOneof("form")
        if asked and not forced and (asked != "json_schema" or not self._form.mark):
            # Without a mark a call is an object like any other.
            why = "goes together with no tools here; leave them out, or demand a call"
            field = f"sampling.{asked}"
            raise InvalidArgument(
                f"{field} {why}", reason="FORM_INVALID", violations=[Violation(field, why, "FORM_INVALID")]
            )
        if not (forced or asked or any(t.strict for t in self._tools)):
            return None
        if asked and not forced:
            check_form(Form("json_schema", wanted.json_schema))
        offered = [
            (t.name, self._schema(n, t.parameters if forced or asked or t.strict else ""))
            for n, t in enumerate(self._tools)
            if self._choice.name in ("", t.name)
        ]
        many = not (self._choice.single or self._choice.name)
        answer = wanted.json_schema if asked else ""
        return Form(
            "grammar",
            grammar(self._form, offered, self._special_ids, free=not forced, many=many, answer=answer),
        )

    def _schema(self, n: int, text: str) -> Mapping[str, object]:
        """A tool's parameters, if they can be enforced."""
        schema: Mapping[str, object] = json.loads(text) if text else {"type": "object"}
        try:
            check_form(Form("json_schema", text or "{}"))
            if schema.get("type", "object") != "object":
                raise InvalidArgument("must be the schema of an object", reason="FORM_INVALID")
        except InvalidArgument as error:
            why = error.message.removeprefix("sampling.json_schema: ")
            raise blamed(f"tools[{n}].parameters", why, "TOOLS_INVALID") from error
        return {"type": "object", **schema}

    def push(self, text: str, finish: str, calls: list[pb.ToolCall]) -> tuple[str, str]:
        """(text, finish) with the calls taken out and added to `calls`."""
        said, found = self._reader.push(text, bool(finish))
        single = self._choice.single or bool(self._choice.name)
        if single and found:
            found, finish = found[:1], "stop"
        calls += [
            pb.ToolCall(id=c.id, name=c.name, arguments=json.dumps(c.arguments, ensure_ascii=False)) for c in found
        ]
        return said, "tool_calls" if self._reader.calls and finish == "stop" else finish
