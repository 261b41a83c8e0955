"""Expressions that a model wrote: parsed by Python's grammar, walked by our own hand, never run."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from services.client.agent import ToolError

MAX_CHARS = 1000
MAX_BITS = 14_000
"""Of a whole number on the way: some 4,200 digits."""

SIGNS = str.maketrans({"^": "**", "×": "*", "·": "*", "÷": "/", "−": "-", "π": "pi"})


class Algebra(Protocol):
    """What numbers and names become, and what is done with them. Each raises ToolError for what it does not know."""

    def number(self, text: str) -> Any: ...
    def name(self, name: str) -> Any: ...
    def function(self, name: str) -> Callable[..., Any]: ...
    def operate(self, operation: Callable[..., Any], *values: Any) -> Any: ...


OPERATIONS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def walk(text: str, algebra: Algebra) -> Any:
    """What an expression means in an algebra. ToolError."""
    if len(text) > MAX_CHARS:
        raise ToolError(f"an expression may have {MAX_CHARS} characters; this one has {len(text)}")
    source = text.translate(SIGNS).strip()
    try:
        return _walked(ast.parse(source, mode="eval").body, source, algebra)
    except (SyntaxError, ValueError) as error:
        why = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ToolError(f"{text[:100]!r} is no expression: {why}; write it as 2*(3+x)") from error
    except (RecursionError, MemoryError) as error:
        raise ToolError("the expression is nested too deep") from error


def _walked(node: ast.expr, source: str, algebra: Algebra) -> Any:
    def inner(child: ast.expr) -> Any:
        return _walked(child, source, algebra)

    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return algebra.number(ast.get_source_segment(source, node) or "")
        case ast.Name(id=name):
            return algebra.name(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            return algebra.operate(OPERATIONS[type(op)], inner(left), inner(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATIONS:
            return algebra.operate(OPERATIONS[type(op)], inner(operand))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return algebra.operate(algebra.function(name), *map(inner, args))
        case _:
            part = ast.get_source_segment(source, node) or ""
            raise ToolError(f"{part[:60]!r} is not allowed: only numbers, names, + - * / // % ^ and functions are")


class Numbers:
    """See Algebra: whole numbers and floats."""

    NAMES: Mapping[str, float] = {"pi": math.pi, "e": math.e, "tau": math.tau}
    FUNCTIONS: Mapping[str, Callable[..., Any]] = {
        **{n: getattr(math, n) for n in ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh")},
        **{
            n: getattr(math, n) for n in ("exp", "log", "log2", "log10", "sqrt", "floor", "ceil", "gcd", "lcm", "hypot")
        },
        **{"ln": math.log, "degrees": math.degrees, "radians": math.radians, "factorial": math.factorial},
        **{"abs": abs, "round": round, "min": min, "max": max},
    }

    def number(self, text: str) -> int | float:
        plain = text.replace("_", "")
        return int(plain) if plain.isdecimal() else float(plain)

    def name(self, name: str) -> float:
        if name not in self.NAMES:
            raise ToolError(f"{name[:40]!r} has no value here; there are {', '.join(self.NAMES)}")
        return self.NAMES[name]

    def function(self, name: str) -> Callable[..., Any]:
        if name not in self.FUNCTIONS:
            raise ToolError(f"there is no function {name[:40]!r}; there are {', '.join(self.FUNCTIONS)}")
        return self.FUNCTIONS[name]

    def operate(self, operation: Callable[..., Any], *values: Any) -> Any:
        """What would take too long is seen before it is done."""
        whole = all(isinstance(v, int) for v in values)
        if operation is operator.pow and whole and values[0].bit_length() * abs(values[1]) > MAX_BITS:
            raise ToolError("the result is too large a number")
        if operation is math.factorial and not (whole and values[0] <= 1000):
            raise ToolError("factorial is of whole numbers up to 1000")
        try:
            found = operation(*values)
        except (ArithmeticError, ValueError, TypeError) as error:
            raise ToolError(f"this cannot be computed: {error}") from error
        if isinstance(found, complex):
            raise ToolError("the result is no real number")
        if isinstance(found, int) and found.bit_length() > MAX_BITS:
            raise ToolError("the result is too large a number")
        return found


def calculate(expression: str) -> str:
    """The value of an expression. ToolError."""
    found = walk(expression, Numbers())
    return str(found) if isinstance(found, int) else format(found, ".12g")
