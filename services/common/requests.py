"""A request's id: whoever asks may give one, and every server that the request passes logs it and passes it on, beside
what makes traces of it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable

from services.common import tracing

KEY = "x-request-id"
"""The HTTP header and the gRPC metadata."""
_GOOD = re.compile(r"[A-Za-z0-9._:/+=-]{1,64}")


def given(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The id in a call's metadata; empty without one, and for one that a log line should not hold."""
    shown = next((str(value) for key, value in metadata or () if key == KEY), "")
    return shown if _GOOD.fullmatch(shown) else ""


def given_or_made(shown: str) -> str:
    """The id that a header shows, if it is one, or a new one."""
    return shown if _GOOD.fullmatch(shown) else uuid.uuid4().hex


def along(number: str) -> tuple[tuple[str, str], ...]:
    """The metadata that passes an id on, and the trace that this task is part of."""
    return (*(((KEY, number),) if number else ()), *tracing.along())
