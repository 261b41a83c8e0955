"""The command line: ``quartet``, or ``python -m services.client``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from services.client.parser import parser
from services.finetune.errors import QuartetError


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; leave with its exit status (services/finetune/errors.py)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["up"], ["gateway"]):
        # Servers are programs of their own: become one, with its flags.
        program = "services.gateway.up" if words[0] == "up" else "services.gateway"
        os.execv(sys.executable, [sys.executable, "-m", program, *words[1:]])
    arguments = parser().parse_args(words)
    try:
        sys.exit(_command(arguments.run)(arguments) or 0)
    except QuartetError as error:
        from services.client.show import tell

        sys.exit(tell(error, arguments.json))
    except BrokenPipeError:
        # Whoever read us has enough; without this the interpreter would complain while it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        # A file of the user's that cannot be read or written; the network raises QuartetError.
        print(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        sys.exit(74)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def _command(run: str) -> Callable[[argparse.Namespace], int | None]:
    """The function of a verb; modules are imported only when they are needed."""
    from importlib import import_module

    module, _, function = run.partition(":")
    found: Callable[[argparse.Namespace], int | None] = getattr(import_module(f"services.client.{module}"), function)
    return found


if __name__ == "__main__":
    main()
