"""OpenAI's image parts: data: URLs become bytes; web addresses are fetched where the gateway's settings allow it."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from quartet.inference.v1 import inference_pb2 as pb

from services.gateway.errors import bad

MAX_FETCHED = 8
"""Addresses in one request."""
_DATA = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,")

Fetch = Callable[[str], Awaitable[bytes]]


def image_part(where: str, part: Mapping[str, Any], fetched: Mapping[str, bytes]) -> pb.Part:
    """A part of type image_url. InvalidArgument (FIELD_INVALID, FIELD_UNSUPPORTED)."""
    given = part.get("image_url")
    field = f"{where}.image_url"
    if not isinstance(given, dict) or not isinstance(given.get("url"), str):
        raise bad(field, "must be an object with a url")
    # An image is seen in one size, which is the best there is.
    if given.get("detail", "auto") not in ("auto", "high"):
        raise bad(f"{field}.detail", "must be auto or high: a model sees images in one size", "FIELD_UNSUPPORTED")
    return pb.Part(image=pb.Image(data=_bytes(f"{field}.url", given["url"], fetched)))


def _bytes(field: str, url: str, fetched: Mapping[str, bytes]) -> bytes:
    if url in fetched:
        return fetched[url]
    if url[:5].lower() != "data:":
        raise bad(
            field,
            "must be a data: URL; addresses are not fetched here unless quartet gateway is started with --image-urls on",
            "FIELD_UNSUPPORTED",
        )
    head = _DATA.match(url[:100])
    if head is None:
        raise bad(field, "must begin as data:image/png;base64,")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad(field, f"is no base64: {error}") from error


async def fetch_images(body: Any, fetch: Fetch) -> dict[str, bytes]:
    """The files at the web addresses of a body's images. InvalidArgument (FIELD_INVALID), and what `fetch` raises."""
    urls = list(dict.fromkeys(_addresses(body)))
    if len(urls) > MAX_FETCHED:
        raise bad("messages", f"hold {len(urls)} addresses of images, and may hold {MAX_FETCHED}")
    return {url: await fetch(url) for url in urls}


def _addresses(body: Any) -> list[str]:
    """Whatever is no body is told by whoever reads it."""
    turns = body.get("messages") if isinstance(body, dict) else None
    found = []
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            given = part.get("image_url") if isinstance(part, dict) else None
            url = given.get("url") if isinstance(given, dict) else None
            if isinstance(url, str) and url[:5].lower() != "data:":
                found.append(url)
    return found
