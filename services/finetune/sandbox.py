"""Jinja for templates that strangers wrote: no way to Python's insides, no end in sight, no memory eaten.

The sandbox of jinja2 guards attributes and long ranges. What it does not guard is guarded here: loops in loops, macros
that call each other, and texts that double at every turn.
"""

from __future__ import annotations

import time
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TURNS = 1_000_000
"""Turns of loops and calls of macros in one rendering."""
MAX_CPU_S = 2.0
"""Of one rendering, looked at on every turn."""
MAX_TEXT = 16 << 20
"""Characters, or entries, that an operator may make at once."""

_COUNT = "counted "  # no template can name it: it ends in a space


class Bounded(ImmutableSandboxedEnvironment):
    """See above; a rendering that goes beyond raises TemplateError."""

    intercepted_binops = frozenset(("+", "*", "**"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.context_class = _Counting
        self.filters[_COUNT] = _count

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counted().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= 64 and abs(left) <= 2**64):
            raise TemplateError("a power is too large")
        if operator == "+" and _size(left) + _size(right) > MAX_TEXT:
            raise TemplateError("a text grows too long")
        if operator == "*":
            for some, times in ((left, right), (right, left)):
                if isinstance(times, int) and _size(some) * times > MAX_TEXT:
                    raise TemplateError("a text grows too long")
        return super().call_binop(context, operator, left, right)


class _Counting(Context):
    """The context of one rendering."""

    turns = 0
    began_s = -1.0


class _Counted(NodeTransformer):
    """Counts every turn of a loop, also of those that its `if` leaves out, and every call of a macro; looks at every text
    that ~ makes."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_counting(nodes.Const(True))))
        if node.test is not None:
            node.test = nodes.And(_counting(nodes.Const(True)), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_counting(nodes.Const(True))))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _counting(node)


def _counting(node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, _COUNT, [], [], None, None)


@pass_context
def _count(context: _Counting, value: Any) -> Any:
    context.turns += 1
    now = time.thread_time()
    if context.began_s < 0:
        context.began_s = now
    if context.turns > MAX_TURNS or now - context.began_s > MAX_CPU_S:
        raise TemplateError("it does not come to an end")
    if _size(value) > MAX_TEXT:
        raise TemplateError("a text grows too long")
    return value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0
