"""Resource names, ids and times, in the grammar of the protos."""

from __future__ import annotations

import hashlib
import re
import uuid
from datetime import UTC, datetime

from services.finetune.errors import InvalidArgument, Violation

ID = r"[a-z][a-z0-9-]{0,62}"
_SPECIAL = {"step": r"[0-9]{1,12}", "recipe": r"[A-Za-z0-9_.-]{1,128}", "upload": r"[A-Za-z0-9_-]{1,128}"}


def parse(pattern: str, name: str, field: str = "name") -> dict[str, str]:
    """The ids in a name, as ``parse("workspaces/{workspace}/models/{model}", name)``.

    Raises InvalidArgument (NAME_MALFORMED) blaming `field`.
    """
    wanted = re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{_SPECIAL.get(m[1], ID)})", pattern)
    match = re.fullmatch(wanted, name)
    if match is None:
        raise InvalidArgument(
            f"{field}: {name[:200]!r} is no name of the form {pattern}; ids are a letter, then letters, digits and '-', "
            "lower case, 63 at most",
            reason="NAME_MALFORMED",
            metadata={"name": name[:200], "form": pattern},
            violations=[Violation(field, f"must have the form {pattern}", "NAME_MALFORMED")],
        )
    return match.groupdict()


def choose_id(given: str, request_id: str, prefix: str) -> str:
    """`given` if it is a good id; else a new one, the same for the same `request_id`."""
    if given:
        parse("{id}", given, field=f"{prefix}_id")
        return given
    text = hashlib.sha256(request_id.encode()).hexdigest() if request_id else uuid.uuid4().hex
    return f"{prefix}-{text[:12]}".replace("_", "-")


def now() -> str:
    """The time in UTC as RFC 3339, with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
