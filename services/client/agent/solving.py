"""Equations by sympy, in a process of its own: ``python -m services.client.agent.solving``, JSON in, JSON out.

sympy's own parser runs what it reads; here it only gets what our walk of the expression built.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.client.agent import ToolError
from services.client.agent.arithmetic import walk

TIMEOUT_S = 60.0
MEMORY_BYTES = 4 << 30
MOST_EQUATIONS = 10


def solve(equations: Sequence[str], variables: Sequence[str] = ()) -> str:
    """The solutions of equations that hold together, as JSON. ToolError."""
    asked = json.dumps({"equations": list(equations), "variables": list(variables)})
    command = [sys.executable, "-m", "services.client.agent.solving"]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"no solution was found within {TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise ToolError("the solver gave up: the equations are too hard for it")
    told: dict[str, Any] = json.loads(done.stdout)
    if "error" in told:
        raise ToolError(told["error"])
    return json.dumps(told["solutions"], ensure_ascii=False)


class Symbols:
    """See arithmetic.Algebra: sympy's expressions, exact."""

    FUNCTIONS = ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "sqrt")

    def __init__(self, sympy: Any) -> None:
        self._sympy = sympy
        self._names = {"pi": sympy.pi, "e": sympy.E}

    def number(self, text: str) -> Any:
        return self._sympy.Rational(text.replace("_", ""))

    def name(self, name: str) -> Any:
        return self._names.get(name) or self._sympy.Symbol(name)

    def function(self, name: str) -> Callable[..., Any]:
        name = {"ln": "log", "abs": "Abs"}.get(name, name)
        if name not in (*self.FUNCTIONS, "Abs"):
            raise ToolError(f"there is no function {name[:40]!r}; there are {', '.join(self.FUNCTIONS)}, abs")
        found: Callable[..., Any] = getattr(self._sympy, name)
        return found

    def operate(self, operation: Callable[..., Any], *values: Any) -> Any:
        try:
            return operation(*values)
        except (ArithmeticError, ValueError, TypeError) as error:
            raise ToolError(f"this cannot be computed: {error}") from error


def solved(equations: Sequence[str], variables: Sequence[str]) -> list[Mapping[str, str]]:
    """The solutions, each a value for every variable. ToolError."""
    try:
        import sympy
    except ImportError as error:
        raise ToolError("sympy is not installed: pip install 'quartet[agent]'") from error
    if not 1 <= len(equations) <= MOST_EQUATIONS:
        raise ToolError(f"give 1 to {MOST_EQUATIONS} equations")
    algebra = Symbols(sympy)
    zeros = []
    for text in equations:
        sides = re.split("==?", text)
        if len(sides) > 2:
            raise ToolError(f"{text[:100]!r} has more than one '='")
        left, right = (walk(side, algebra) for side in (*sides, "0")[:2])
        zeros.append(left - right)
    for name in variables:
        if not name.isidentifier():
            raise ToolError(f"{name[:40]!r} is no name of a variable")
    wanted = [sympy.Symbol(v) for v in variables] or sorted(set().union(*(z.free_symbols for z in zeros)), key=str)
    if not wanted:
        raise ToolError("there is no variable in the equations")
    try:
        found = sympy.solve(zeros, wanted, dict=True)
    except NotImplementedError as error:
        raise ToolError("no way to solve these equations is known") from error
    return [{str(name): str(value) for name, value in one.items()} for one in found]


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    asked = json.load(sys.stdin)
    try:
        print(json.dumps({"solutions": solved(asked["equations"], asked["variables"])}))
    except ToolError as error:
        print(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    main()
