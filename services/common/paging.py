"""Lists in pages, with the small part of AIP-160 and AIP-132 that the protos promise."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from services.finetune.errors import InvalidArgument

T = TypeVar("T")

_TERM = re.compile(r'([A-Za-z_][\w.-]*)\s*=\s*(?:"([^"]*)"|([\w.:/-]+))\s*(?:$|AND\s+(?=\S))')


def page(
    items: Sequence[T],
    *,
    fields: Callable[[T], Mapping[str, Any]],
    page_size: int,
    page_token: str,
    filter: str,
    order_by: str,
    orders: Sequence[str],
    default_order: str,
) -> tuple[list[T], str]:
    """One page of `items` and the token of the next, "" at the end.

    `fields` gives what may be filtered and ordered by, "name" among it; `orders` are the allowed order_by fields.
    Raises InvalidArgument (FILTER_MALFORMED, PAGE_TOKEN_MALFORMED, ORDER_BY_UNKNOWN).
    """
    key, _, direction = (order_by or default_order).partition(" ")
    if key not in orders or direction not in ("", "asc", "desc"):
        raise InvalidArgument(
            f"order_by: {order_by!r} is not offered; use one of {', '.join(orders)}, with ' desc' or without",
            reason="ORDER_BY_UNKNOWN",
        )
    wanted = _terms(filter)
    found = [(fields(item), item) for item in items]
    found = [(f, item) for f, item in found if all(_text(_look(f, k)) == v for k, v in wanted)]
    found.sort(key=lambda pair: (pair[0][key], pair[0]["name"]), reverse=direction == "desc")
    order = f"{key} {direction or 'asc'}"
    if page_token:
        last = _read_token(page_token, order)
        found = [pair for pair in found if _after((pair[0][key], pair[0]["name"]), last, direction == "desc")]
    size = min(page_size, 1000) if page_size > 0 else 50
    chosen = [item for _, item in found[:size]]
    if len(found) <= size:
        return chosen, ""
    return chosen, _token(order, found[size - 1][0][key], found[size - 1][0]["name"])


def _terms(filter: str) -> list[tuple[str, str]]:
    if not filter.strip():
        return []
    terms, at, text = [], 0, filter.strip()
    while at < len(text):
        match = _TERM.match(text, at)
        if match is None:
            raise InvalidArgument(
                f'filter: cannot read {text[at : at + 100]!r}; write field = "value", joined by AND',
                reason="FILTER_MALFORMED",
            )
        terms.append((match[1], match[2] if match[2] is not None else match[3]))
        at = match.end()
    return terms


def _look(fields: Mapping[str, Any], key: str) -> Any:
    value: Any = fields
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _token(order: str, *last: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps([order, *last]).encode()).decode()


def _after(place: tuple[Any, Any], last: tuple[Any, Any], descending: bool) -> bool:
    return place < last if descending else place > last


def _read_token(token: str, order: str) -> tuple[Any, Any]:
    """Where the page before ended: a place in the order, not an item, which may be gone by now."""
    try:
        made_for, value, name = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (binascii.Error, ValueError, TypeError) as error:
        raise _bad_token("it is not one that this list gave") from error
    if made_for != order:
        raise _bad_token(f"it was given for the order {made_for}")
    return value, name


def _bad_token(why: str) -> InvalidArgument:
    return InvalidArgument(f"page_token: {why}; start again without it", reason="PAGE_TOKEN_MALFORMED")
