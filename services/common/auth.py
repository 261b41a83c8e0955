"""The bearer token: one secret in a file, read at start, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path

from services.finetune.errors import FailedPrecondition, Unauthenticated

Metadata = Sequence[tuple[str, str | bytes]]


def read_token(path: str) -> str:
    """The token in a file. FailedPrecondition (TOKEN_FILE_UNREADABLE)."""
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"cannot read the token file {path}", reason="TOKEN_FILE_UNREADABLE") from error
    if len(token) < 16:
        raise FailedPrecondition(
            f"the token in {path} is too short to be a secret: use 16 characters or more",
            reason="TOKEN_FILE_UNREADABLE",
        )
    return token


def bearer(token: str) -> Metadata:
    """The metadata that shows a token."""
    return (("authorization", f"Bearer {token}"),)


def check(token: str, metadata: Metadata) -> None:
    """Compare what a caller shows. Unauthenticated (TOKEN_MISSING, TOKEN_WRONG)."""
    shown = next((str(v) for k, v in metadata if k == "authorization"), "")
    if not shown.startswith("Bearer "):
        raise Unauthenticated(
            "this server wants a token: set QUARTET_TOKEN_FILE, or send 'authorization: Bearer …'",
            reason="TOKEN_MISSING",
        )
    if not hmac.compare_digest(shown.removeprefix("Bearer ").encode(), token.encode()):
        raise Unauthenticated("the token is not this server's", reason="TOKEN_WRONG")
