"""Files from the web for whoever may ask any address: nothing inside is reached, and nothing large or slow comes through.

An address is read by one parser, its host resolved once, every answer of the resolver checked, and that answer is what is
connected to: so neither another parser nor another answer can lead elsewhere. Redirects are addresses as any.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import re
import socket
import ssl
import time
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from services.finetune.errors import InvalidArgument, PermissionDenied, QuartetError

MAX_BYTES = 3_500_000
"""What goes into one message to the services, with room for the rest of it."""
DEADLINE_S = 15.0
MAX_REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
_PLAIN = re.compile(r"[!-\[\]-~]+")
"""Printable ASCII but the backslash, which parsers disagree about."""
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?|\[?[0-9a-f:.]{2,45}\]?")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REDIRECTS = (301, 302, 303, 307, 308)


async def fetch(url: str) -> bytes:
    """The file at a web address.

    PermissionDenied (URL_FORBIDDEN) for one that is not public, InvalidArgument (URL_MALFORMED, URL_UNREACHABLE,
    IMAGE_TOO_LARGE).
    """
    return await asyncio.to_thread(_fetch, url, time.monotonic() + DEADLINE_S)


def _fetch(url: str, deadline: float) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        parts = check_url(url)
        found = _get(parts, resolve(parts), deadline)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise _unreachable(url, f"it redirects more than {MAX_REDIRECTS} times")


def check_url(url: str) -> SplitResult:
    """The parts of a plain web address. InvalidArgument (URL_MALFORMED)."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise _malformed(url, str(error)) from error
    if len(url) > 2048 or not _PLAIN.fullmatch(url):
        raise _malformed(url, "it may have 2048 printable ASCII characters, no spaces and no backslash")
    if parts.scheme not in PORTS or not _HOST.fullmatch(host):
        raise _malformed(url, "it must be http:// or https:// with a host's name")
    if "@" in parts.netloc or port not in (None, PORTS[parts.scheme]):
        raise _malformed(url, "it may have neither a user nor a port of its own")
    return parts


def resolve(parts: SplitResult) -> str:
    """One public IP address of the host. PermissionDenied (URL_FORBIDDEN) if any is not public: an attacker's name server
    may mix them."""
    host = parts.hostname or ""
    try:
        answers = socket.getaddrinfo(host, PORTS[parts.scheme], type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _unreachable(parts.geturl(), f"{host} is not known") from error
    addresses = [str(answer[4][0]).partition("%")[0] for answer in answers]
    if not addresses or not all(map(is_public, addresses)):
        raise PermissionDenied(
            f"{host} is no public host, and only those are asked for images; send the image as a data: URL",
            reason="URL_FORBIDDEN",
        )
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also where it holds another one."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        held = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            held.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(inner is not None and not is_public(str(inner)) for inner in held):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback)


def _get(parts: SplitResult, address: str, deadline: float) -> bytes | str:
    """The body, or where it redirects to."""
    url = parts.geturl()
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    line = _Line(parts, address, deadline)
    try:
        headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "quartet"}
        line.request("GET", path, headers=headers)
        with line.getresponse() as answer:
            if answer.status in _REDIRECTS:
                return str(answer.headers.get("location", ""))
            if answer.status != 200:
                raise _unreachable(url, f"it answers with {answer.status}")
            return _read(url, answer, line)
    except QuartetError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _unreachable(url, f"{type(error).__name__}: {error}"[:200]) from error
    finally:
        line.close()


def _read(url: str, answer: http.client.HTTPResponse, line: _Line) -> bytes:
    data = bytearray()
    while piece := answer.read1(1 << 16):
        data += piece
        if len(data) > MAX_BYTES:
            raise InvalidArgument(f"{url[:200]}: more than {MAX_BYTES} bytes; scale it down", reason="IMAGE_TOO_LARGE")
        # A server that drips is not waited for longer than one that is silent.
        line.hurry()
    return bytes(data)


class _Line(http.client.HTTPConnection):
    """A connection to an IP address that was checked, under the host's name."""

    def __init__(self, parts: SplitResult, address: str, deadline: float) -> None:
        super().__init__(parts.hostname or "", PORTS[parts.scheme])
        self._address, self._deadline, self._secure = address, deadline, parts.scheme == "https"

    def connect(self) -> None:
        made: Any = socket.create_connection((self._address, self.port), max(self._deadline - time.monotonic(), 0.01))
        self.sock = made
        self.hurry()
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(made, server_hostname=self.host)

    def hurry(self) -> None:
        """TimeoutError if the time is over; else whatever is waited for has what is left of it."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"not done within {DEADLINE_S:.0f} s")
        if self.sock is not None:
            self.sock.settimeout(left)


def _malformed(url: str, why: str) -> InvalidArgument:
    shown = url[:100].encode("ascii", "backslashreplace").decode()
    return InvalidArgument(f"{shown!r} is no address of an image: {why}", reason="URL_MALFORMED")


def _unreachable(url: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{url[:200]} cannot be fetched: {why}", reason="URL_UNREACHABLE")
