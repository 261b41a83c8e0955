from __future__ import annotations

import pytest

from services.common.status import DEFAULT_STATUS_BYTES, MAX_STATUS_BYTES, fitted, from_status, to_status
from services.finetune.errors import BY_CODE, InvalidArgument, QuartetError, Violation


@pytest.mark.parametrize("cls", list(BY_CODE.values()))
def test_every_error_survives_the_wire(cls: type[QuartetError]) -> None:
    sent = cls("wörds", reason="A_REASON", metadata={"k": "v"}, violations=[Violation("a.b", "wrong", "WRONG")])
    got = from_status(to_status(sent))
    assert type(got) is cls
    assert got.to_json() == sent.to_json()


def test_violations_that_do_not_fit_are_counted() -> None:
    blamed = [Violation(f"files[a.jsonl].rows[{n}].messages[1].content", "é" * 60, "FIELD_MISSING") for n in range(100)]
    sent = InvalidArgument("bad rows", reason="ROWS_INVALID", violations=blamed)
    status = fitted(sent, DEFAULT_STATUS_BYTES)
    got = from_status(status)
    assert status.ByteSize() <= DEFAULT_STATUS_BYTES
    assert 10 < len(got.violations) < 100
    assert int(got.metadata["violations_left_out"]) == 100 - len(got.violations)
    assert from_status(fitted(sent, MAX_STATUS_BYTES)).to_json() == sent.to_json()


def test_a_huge_message_is_cut() -> None:
    assert fitted(InvalidArgument("x" * 100_000, reason="R"), DEFAULT_STATUS_BYTES).ByteSize() <= DEFAULT_STATUS_BYTES
