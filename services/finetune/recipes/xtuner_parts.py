"""A table of XTuner's config being read: values are taken by key, and what nobody takes is refused by its line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from services.finetune.errors import InvalidArgument, Violation
from services.finetune.recipes.python_text import Symbol, Table


@dataclass(slots=True)
class Reading:
    file: str
    bot: str = ""
    """What the model is called in MOSS texts."""
    changes: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Violation] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def refuse(self) -> None:
        if self.problems:
            first, more = self.problems[0], len(self.problems) - 1
            raise InvalidArgument(
                f"{self.file}: {first.field} {first.message}" + (f"; and {more} more" if more else ""),
                reason="CONFIG_UNSUPPORTED",
                violations=self.problems,
            )


@dataclass(slots=True)
class Part:
    """A table being read: what nobody takes from it is refused by `close`."""

    reading: Reading
    name: str
    table: Table
    seen: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return self.table.items.get(key, default)

    def number(self, key: str, default: float) -> float:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.blame(key, "must be a number")
            return default
        return value

    def whole(self, key: str, default: int) -> int:
        value = self.number(key, default)
        if value != int(value):
            self.blame(key, "must be a whole number")
        return int(value)

    def text(self, key: str, default: str = "") -> str:
        value = self.take(key, default)
        if value is not None and not isinstance(value, str):
            self.blame(key, "must be a text")
            return default
        return value or ""

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            self.blame(key, "must be True or False")
        return bool(value)

    def only(self, key: str, *allowed: Any) -> None:
        """Values that mean the same here; any other is refused."""
        value = self.take(key, allowed[0])
        if not any(value == a and type(value) is type(a) for a in allowed):
            self.blame(key, f"can only be {' or '.join(repr(a) for a in allowed)}")

    def idle(self, *keys: str) -> None:
        """Keys without an effect on what is learned."""
        self.seen.update(keys)

    def part(self, key: str) -> Part | None:
        value = self.take(key)
        if isinstance(value, Table):
            return Part(self.reading, f"{self.name}.{key}".lstrip("."), value)
        if value is not None:
            self.blame(key, "must be a dict(...)")
        return None

    def parts(self, key: str) -> list[Part]:
        value = self.take(key)
        listed = value if isinstance(value, list | tuple) else [] if value is None else [value]
        found = []
        for n, item in enumerate(listed):
            if isinstance(item, Table):
                found.append(Part(self.reading, f"{self.name}.{key}[{n}]".lstrip("."), item))
            else:
                self.blame(key, "must hold dict(...)s")
        return found

    def kind(self, key: str = "type") -> str:
        """The last part of a class's or function's name; for a loader, as `Class.from_pretrained`, the class's."""
        value = self.take(key)
        path = value.path if isinstance(value, Symbol) else value if isinstance(value, str) else ""
        return path.removesuffix(".from_pretrained").rpartition(".")[2]

    def one_of(self, *names: str) -> str:
        kind = self.kind()
        if kind not in names:
            self.blame("type", f"{kind or 'is missing'}: can only be {' or '.join(names)}")
        return kind

    def set(self, key: str, value: Any) -> None:
        self.reading.changes[key] = value

    def note(self, key: str, text: str) -> None:
        line = self.table.lines.get(key, self.table.line)
        self.reading.notes.append(f"line {line}: {f'{self.name}.{key}'.lstrip('.')}: {text}")

    def blame(self, key: str, why: str) -> None:
        line = self.table.lines.get(key, self.table.line)
        self.reading.problems.append(
            Violation(f"{self.name}.{key}".lstrip("."), f"(line {line}) {why}", "CONFIG_UNSUPPORTED")
        )

    def close(self) -> None:
        for key in self.table.items:
            if key not in self.seen:
                self.blame(key, "cannot be honoured; take it out")
        if not self.name:
            self.reading.taken |= self.seen
