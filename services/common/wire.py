"""Plain values to protobuf's well-known types and back, and what servicers of jobs share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.status import to_status
from services.finetune.errors import from_json

WATCH_S = 0.1


def to_struct(data: Mapping[str, Any]) -> Struct:
    return json_format.ParseDict(dict(data), Struct())


def from_struct(struct: Struct) -> dict[str, Any]:
    """A Struct as plain data; whole numbers are ints again."""
    data: dict[str, Any] = json.loads(json_format.MessageToJson(struct), parse_float=_number)
    return data


def timestamp(text: str | None) -> Timestamp | None:
    """RFC 3339 text as a Timestamp."""
    if not text:
        return None
    made = Timestamp()
    made.FromJsonString(text)
    return made


def timestamp_of(seconds: float) -> Timestamp:
    """Seconds since 1970 as a Timestamp."""
    made = Timestamp()
    made.FromNanoseconds(int(seconds * 1e9))
    return made


def error_status(data: Mapping[str, Any] | None) -> Any:
    """An error kept as JSON, as google.rpc.Status."""
    return to_status(from_json(data)) if data else None


def fingerprint(message: Message) -> str:
    """A request as text that is equal for equal requests."""
    return json_format.MessageToJson(message, sort_keys=True, indent=None)


async def follow(
    batches: Iterator[list[tuple[int, dict[str, Any]]]],
) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Events of Jobs.watch for an async servicer: queries run in threads, pauses give way."""
    done = object()
    while True:
        batch: Any = await asyncio.to_thread(next, batches, done)
        if batch is done:
            return
        for item in batch:
            yield item
        if not batch:
            await asyncio.sleep(WATCH_S)


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
