"""Python text read as data: assignments, dict(...), constants. Nothing in it is ever run or looked up.

The text is parsed and its syntax tree walked; what an import brings in is a `Symbol`, a name and no more. Whatever is not
plain data (functions, loops, calls of anything but dict and imported names) is refused with its line and column.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.finetune.errors import InvalidArgument

MAX_TEXT_BYTES = 1 << 20
MAX_BASES = 16
MAX_NUMBER_BITS = 256

Neighbour = Callable[[str], str]
"""Called with the path of a base config, relative to the text; its text."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """What an import brings in, or an attribute of it: "torch.float16"."""

    path: str

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rpartition(".")[2]


@dataclass(slots=True)
class Table:
    """A dict of the text: its items, the line of each, and its own."""

    line: int
    items: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def put(self, key: str, value: Any, line: int) -> None:
        self.items[key] = value
        self.lines[key] = line


def read_python(text: str, file: str, given: Mapping[str, Any], neighbour: Neighbour) -> Table:
    """The names that a text binds. `given` values take the place of what the text assigns to those names.

    InvalidArgument (CONFIG_SYNTAX) with line and column.
    """
    table = Table(1)
    _Reader(file, table, given, neighbour, [file]).read(text)
    return table


_OPERATORS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: lambda a, b: a is b if a is None or b is None else a == b,
    ast.IsNot: lambda a, b: a is not b if a is None or b is None else a != b,
}


@dataclass(slots=True)
class _Reader:
    file: str
    names: Table
    given: Mapping[str, Any]
    neighbour: Neighbour
    bases: list[str]
    """Files read so far, the deepest last."""
    symbols: dict[str, Any] = field(default_factory=dict)

    def read(self, text: str) -> None:
        if len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
            raise InvalidArgument(f"{self.file}: a config of more than 1 MiB", reason="CONFIG_SYNTAX")
        try:
            body = ast.parse(text, self.file).body
            for statement in body:
                self.statement(statement)
        except SyntaxError as error:
            raise InvalidArgument(
                f"{self.file}:{error.lineno}:{error.offset}: not Python: {error.msg}", reason="CONFIG_SYNTAX"
            ) from error
        except (RecursionError, MemoryError, ValueError) as error:
            # ValueError is also what a NUL byte in the text raises; our own errors are ValueErrors too.
            if isinstance(error, InvalidArgument):
                raise
            raise InvalidArgument(f"{self.file}: cannot be read: {error}", reason="CONFIG_SYNTAX") from error

    # ------------------------------------------------------------------------------------------ statements

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Import() | ast.ImportFrom():
                self.imports(node)
            case ast.Assign(targets=targets, value=value):
                made = self.value(value)
                for target in targets:
                    self.assign(target, made)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.assign(target, self.value(value))
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                if name not in self.given:
                    self.assign(target, self.operate(node, op, self.look_up(target, name), self.value(value)))
            case ast.If(test=test, body=body, orelse=orelse):
                for inner in body if self.value(test) else orelse:
                    self.statement(inner)
            case ast.With(items=[ast.withitem(context_expr=ast.Call(func=ast.Name(id="read_base")))], body=body):
                for inner in body:
                    self.base(inner)
            case ast.Expr(value=ast.Constant(value=str())) | ast.Pass():
                pass  # a docstring says nothing to us
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=owner, attr="update")) as call):
                self.update(call, self.value(owner))
            case _:
                raise self.refuse(node, f"{_kind(node)} is no plain data; a config may only assign values")

    def imports(self, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                path = alias.name if alias.asname else alias.name.partition(".")[0]
                self.symbols[alias.asname or path] = Symbol(path)
            return
        if node.level or any(alias.name == "*" for alias in node.names):
            raise self.refuse(node, "a config beside this one is brought in below `with read_base():`")
        for alias in node.names:
            self.symbols[alias.asname or alias.name] = Symbol(f"{node.module}.{alias.name}")

    def base(self, node: ast.stmt) -> None:
        """`from .file import *` below read_base: the names of that file, as if they stood here."""
        if not isinstance(node, ast.ImportFrom) or not node.level or not node.module:
            raise self.refuse(node, "below read_base only `from .file import *` can be read")
        path = "../" * (node.level - 1) + node.module.replace(".", "/") + ".py"
        if len(self.bases) >= MAX_BASES or path in self.bases:
            raise self.refuse(node, f"{path} is read by itself, or bases lie too deep")
        table = Table(1)
        inner = _Reader(path, table, self.given, self.neighbour, [*self.bases, path])
        inner.read(self.neighbour(path))
        wanted = [alias.name for alias in node.names]
        for name, value in table.items.items():
            if name in wanted or wanted == ["*"]:
                self.names.put(name, value, node.lineno)
        if wanted == ["*"]:
            self.symbols |= inner.symbols

    def assign(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id=name):
                self.symbols.pop(name, None)
                self.names.put(name, self.given.get(name, value), target.lineno)
            case ast.Tuple(elts=targets) | ast.List(elts=targets) if isinstance(value, list | tuple) and len(
                value
            ) == len(targets):
                for inner, part in zip(targets, value, strict=True):
                    self.assign(inner, part)
            case ast.Subscript(value=owner, slice=ast.Constant(value=str(key))) | ast.Attribute(value=owner, attr=key):
                table = self.value(owner)
                if not isinstance(table, Table):
                    raise self.refuse(target, "only a part of a dict(...) can be assigned to")
                table.put(key, value, target.lineno)
            case _:
                raise self.refuse(target, f"cannot assign to {_kind(target)}")

    def update(self, call: ast.Call, owner: Any) -> None:
        if not isinstance(owner, Table):
            raise self.refuse(call, "only a dict(...) has update")
        for made in [*(self.value(a) for a in call.args), self.table(call, [])]:
            if not isinstance(made, Table):
                raise self.refuse(call, "update takes a dict(...)")
            for key, value in made.items.items():
                owner.put(key, value, made.lines[key])

    # ------------------------------------------------------------------------------------------ values

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return value
            case ast.Name(id=name):
                return self.look_up(node, name)
            case ast.List(elts=parts):
                return self.parts(parts)
            case ast.Tuple(elts=parts):
                return tuple(self.parts(parts))
            case ast.Dict():
                return self.braces(node)
            case ast.Call():
                return self.call(node)
            case ast.Attribute(value=owner, attr=name):
                return self.attribute(node, self.value(owner), name)
            case ast.Subscript(value=owner, slice=key):
                return self.subscript(node, self.value(owner), self.value(key))
            case ast.BinOp(left=left, op=op, right=right):
                return self.operate(node, op, self.value(left), self.value(right))
            case ast.UnaryOp(op=op, operand=operand):
                return self.unary(node, op, self.value(operand))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self.value(test) else orelse)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self.operate(node, op, self.value(left), self.value(right))
            case ast.BoolOp(op=op, values=values):
                return self.both_or_either(op, values)
            case ast.JoinedStr(values=parts):
                text = "".join(self.formatted(part) for part in parts)
                if len(text) > MAX_TEXT_BYTES:
                    raise self.refuse(node, "the text is too long")
                return text
            case _:
                raise self.refuse(node, f"{_kind(node)} is no plain data")

    def look_up(self, node: ast.expr, name: str) -> Any:
        if name in self.names.items:
            return self.names.items[name]
        if name in self.symbols:
            return self.symbols[name]
        raise self.refuse(node, f"{name} is bound by nothing before this line")

    def parts(self, nodes: list[ast.expr]) -> list[Any]:
        found: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                inner = self.value(node.value)
                if not isinstance(inner, list | tuple):
                    raise self.refuse(node, "only a list can be spread here")
                found += inner
            else:
                found.append(self.value(node))
        return found

    def braces(self, node: ast.Dict) -> Table:
        table = Table(node.lineno)
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                self.spread(value, table)
                continue
            name = self.value(key)
            if not isinstance(name, str):
                raise self.refuse(key, "only texts can be keys")
            table.put(name, self.value(value), key.lineno)
        return table

    def call(self, node: ast.Call) -> Any:
        """dict(...), or an imported class: the same as dict(type=Class, ...)."""
        if isinstance(node.func, ast.Name) and node.func.id == "dict" and not self.bound("dict"):
            return self.table(node, node.args)
        if isinstance(node.func, ast.Name) and node.func.id in ("int", "float") and not self.bound(node.func.id):
            return self.number(node)
        function = self.value(node.func)
        if not isinstance(function, Symbol) or node.args:
            raise self.refuse(node, "only dict(...) and imported classes with named arguments can be called")
        table = Table(node.lineno)
        table.put("type", function, node.lineno)
        return self.table(node, [], table)

    def bound(self, name: str) -> bool:
        return name in self.names.items or name in self.symbols

    def number(self, node: ast.Call) -> int | float:
        """int(...) or float(...) of a number."""
        values = [self.value(arg) for arg in node.args]
        if len(values) != 1 or node.keywords or not isinstance(values[0], int | float) or not abs(values[0]) < 1e300:
            raise self.refuse(node, "int and float take one number")
        return int(values[0]) if isinstance(node.func, ast.Name) and node.func.id == "int" else float(values[0])

    def table(self, node: ast.Call, args: list[ast.expr], start: Table | None = None) -> Table:
        table = start or Table(node.lineno)
        for arg in args:
            self.spread(arg, table)
        for keyword in node.keywords:
            if keyword.arg is None:
                self.spread(keyword.value, table)
            else:
                table.put(keyword.arg, self.value(keyword.value), keyword.lineno)
        return table

    def spread(self, node: ast.expr, table: Table) -> None:
        inner = self.value(node)
        if not isinstance(inner, Table):
            raise self.refuse(node, "only a dict(...) can be spread here")
        for key, value in inner.items.items():
            table.put(key, value, inner.lines[key])

    def attribute(self, node: ast.expr, owner: Any, name: str) -> Any:
        if isinstance(owner, Symbol):
            return Symbol(f"{owner.path}.{name}")
        return self.subscript(node, owner, name)

    def subscript(self, node: ast.expr, owner: Any, key: Any) -> Any:
        try:
            if isinstance(owner, Table):
                return owner.items[key]
            if isinstance(owner, list | tuple | str) and isinstance(key, int):
                return owner[key]
        except (KeyError, IndexError, TypeError):
            pass
        raise self.refuse(node, f"there is no {key!r} in it")

    def unary(self, node: ast.expr, op: ast.unaryop, value: Any) -> Any:
        if isinstance(op, ast.Not):
            return not value
        if not isinstance(value, int | float) or isinstance(op, ast.Invert):
            raise self.refuse(node, "only a number has a sign")
        return -value if isinstance(op, ast.USub) else value

    def both_or_either(self, op: ast.boolop, values: list[ast.expr]) -> Any:
        found: Any = None
        for value in values:
            found = self.value(value)
            if bool(found) == isinstance(op, ast.Or):
                return found
        return found

    def operate(self, node: ast.AST, op: ast.AST, left: Any, right: Any) -> Any:
        """Arithmetic on numbers, + on texts and lists, comparisons. Numbers are kept small: a text may be hostile."""
        compares = isinstance(op, ast.cmpop)
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        joins = isinstance(op, ast.Add) and type(left) is type(right) and isinstance(left, str | list | tuple)
        if type(op) not in _OPERATORS or not (compares or numbers or joins):
            raise self.refuse(node, f"cannot work out {_kind(op)} of {_what(left)} and {_what(right)}")
        if isinstance(op, ast.Pow) and not (abs(left) <= 1 << 20 and abs(right) <= 12):
            raise self.refuse(node, "the power is too large")
        try:
            made = _OPERATORS[type(op)](left, right)
        except (ArithmeticError, TypeError) as error:
            raise self.refuse(node, str(error)) from error
        if isinstance(made, complex) or (isinstance(made, int) and made.bit_length() > MAX_NUMBER_BITS):
            raise self.refuse(node, "the number is too large, or none")
        if joins and len(made) > MAX_TEXT_BYTES:
            raise self.refuse(node, "the text or list is too long")
        return made

    def formatted(self, node: ast.expr) -> str:
        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.FormattedValue(value=inner, conversion=-1, format_spec=None):
                value = self.value(inner)
                if isinstance(value, str | int | float):
                    return str(value)
        raise self.refuse(node, "only texts and numbers can stand in an f-string, without a format")

    def refuse(self, node: ast.AST, why: str) -> InvalidArgument:
        line, column = getattr(node, "lineno", 0), getattr(node, "col_offset", 0) + 1
        return InvalidArgument(
            f"{self.file}:{line}:{column}: {why}",
            reason="CONFIG_SYNTAX",
            metadata={"file": self.file, "line": str(line), "column": str(column)},
        )


def _kind(node: ast.AST) -> str:
    """A construct for people: `FunctionDef` -> "a function definition"."""
    known = {
        ast.FunctionDef: "a function definition",
        ast.AsyncFunctionDef: "a function definition",
        ast.ClassDef: "a class definition",
        ast.Lambda: "a lambda",
        ast.For: "a loop",
        ast.While: "a loop",
        ast.ListComp: "a comprehension",
        ast.DictComp: "a comprehension",
        ast.GeneratorExp: "a comprehension",
        ast.Expr: "an expression that is not assigned",
        ast.Try: "a try",
        ast.With: "a with",
        ast.Delete: "a del",
    }
    return known.get(type(node), type(node).__name__)


def _what(value: Any) -> str:
    if isinstance(value, Symbol):
        return f"the imported {value.path}"
    return "a dict" if isinstance(value, Table) else f"a {type(value).__name__}"
