"""What holds of every file, whoever writes it."""

from __future__ import annotations

from pathlib import Path

SERVICES = Path(__file__).parents[1] / "services"
MOST_LINES = 400


def test_no_file_is_too_long_to_read_at_once() -> None:
    files = sorted(SERVICES.rglob("*.py"))
    assert files
    lines = {str(file.relative_to(SERVICES)): len(file.read_text().splitlines()) for file in files}
    long = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert not long, f"more than {MOST_LINES} lines: split them by what they are about"
