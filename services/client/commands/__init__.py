"""The verbs of the command line by resource: arguments in, exit status out (None is 0)."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

from services.client.client import Client
from services.finetune.errors import NotFound


def connect(a: Namespace) -> Client:
    """A client by a command's flags; what they leave out comes from QUARTET_* variables."""
    return Client(a.endpoint, a.token_file, tls_ca=a.tls_ca, tls_cert=a.tls_cert, tls_key=a.tls_key)


def readable(text: str) -> Path:
    """A file that is there. NotFound (FILE_NOT_FOUND)."""
    path = Path(text)
    if not path.is_file():
        raise NotFound(f"{text} is no file", reason="FILE_NOT_FOUND")
    return path


def short_name(text: str) -> str:
    """A resource id made of any text: SmolLM2-135M-Instruct.Q4_1 -> smollm2-135m-instruct-q4-1; maybe empty."""
    made = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (made if made[:1].isalpha() else f"m-{made}" if made else "")[:63].rstrip("-")
