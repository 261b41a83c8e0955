from __future__ import annotations

from pathlib import Path

import pytest

from services.common import auth
from services.finetune.errors import FailedPrecondition, Unauthenticated

TOKEN = "correct-horse-battery"


def test_the_token_itself_passes() -> None:
    auth.check(TOKEN, auth.bearer(TOKEN))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "TOKEN_MISSING"),
        ((("authorization", "Basic x"),), "TOKEN_MISSING"),
        ((("authorization", "Bearer "),), "TOKEN_WRONG"),
        ((("authorization", f"Bearer {TOKEN}x"),), "TOKEN_WRONG"),
        ((("authorization", "Bearer é"),), "TOKEN_WRONG"),
    ],
)
def test_anything_else_does_not(metadata: auth.Metadata, reason: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        auth.check(TOKEN, metadata)
    assert caught.value.reason == reason
    assert TOKEN not in caught.value.message


def test_the_file_is_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    assert auth.read_token(str(path)) == TOKEN
    path.write_text("short")
    for bad in (path, tmp_path / "none"):
        with pytest.raises(FailedPrecondition):
            auth.read_token(str(bad))
