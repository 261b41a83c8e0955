"""Python text as data: what is plain comes out, whatever else is refused by line and column, and nothing ever runs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.finetune.errors import InvalidArgument
from services.finetune.recipes.python_text import Symbol, Table, read_python
from services.finetune.recipes.xtuner import no_neighbour

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
values = st.recursive(
    scalars,
    lambda v: st.lists(v, max_size=4) | st.tuples(v, v) | st.dictionaries(st.text(), v, max_size=4),
    max_leaves=12,
)


def read(text: str, given: dict[str, Any] | None = None) -> dict[str, Any]:
    return {name: plain(value) for name, value in read_python(text, "x.py", given or {}, no_neighbour).items.items()}


def plain(value: Any) -> Any:
    if isinstance(value, Table):
        return {key: plain(inner) for key, inner in value.items.items()}
    return type(value)(plain(v) for v in value) if isinstance(value, list | tuple) else value


@settings(deadline=None)
@given(values)
def test_what_python_writes_is_read_back(value: Any) -> None:
    assert read(f"x = {value!r}") == {"x": value}


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read(text)
    except InvalidArgument as error:
        assert error.reason == "CONFIG_SYNTAX"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a = 2\nb = a * 3 + 1 - -a", 9),
        ("a = [1]\na += [2]\nb = a", [1, 2]),
        ("a, b = 1, 2", 2),
        ("b: float = 1e-3", 1e-3),
        ("n = 1\nb = 'x' if n > 1 else 'y'", "y"),
        ("n = 1\nif n == 1:\n    b = 'one'\nelse:\n    b = 'other'", "one"),
        ("b = dict(x=1, **dict(y=2))", {"x": 1, "y": 2}),
        ("a = dict(x=dict(y=1))\na['x']['y'] = 2\na.x.z = 3\nb = a", {"x": {"y": 2, "z": 3}}),
        ("a = dict(x=1)\na.update(x=2, y=3)\nb = a", {"x": 2, "y": 3}),
        ("b = {'x': [*[1, 2], 3]}", {"x": [1, 2, 3]}),
        ("r = './data/'\nb = f'{r}a.json' + '!'", "./data/a.json!"),
        ("b = not None and (0 or 'x')", "x"),
        ("import torch\nb = torch.float16", Symbol("torch.float16")),
        ("from a.b import C as D\nb = D.from_x", Symbol("a.b.C.from_x")),
        ("from peft import LoraConfig\nb = LoraConfig(r=8)", {"type": Symbol("peft.LoraConfig"), "r": 8}),
        ("b = int(2048 - (336 / 14) ** 2)", 1472),
        ("'''about'''\nb = [1, 2][1]", 2),
    ],
)
def test_what_a_config_may_say(text: str, wanted: Any) -> None:
    assert read(text)["b"] == wanted


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("x = 1\ndef f():\n    pass", "x.py:2:1: a function definition"),
        ("x = [i for i in (1, 2)]", "x.py:1:5: a comprehension"),
        ("x = __import__('os').system('id')", "x.py:1:5"),
        ("import os\nx = os.system('id')", "x.py:2:5: only dict"),
        ("x = open('/etc/passwd')", "x.py:1:5: open is bound by nothing"),
        ("for i in (1,):\n    x = i", "x.py:1:1: a loop"),
        ("x = lambda: 1", "x.py:1:5: a lambda"),
        ("print(1)", "x.py:1:1: an expression"),
        ("x = y", "x.py:1:5: y is bound by nothing"),
        ("x = 1\nx['a'] = 2", "x.py:2:1: only a part of a dict"),
        ("x = 1 +", "x.py:1:"),
        ("from .base import *", "read_base"),
        ("x = 1 / 0", "x.py:1:5"),
        ("x = dict(1)", "x.py:1:10: only a dict"),
        ("x = {1: 2}", "x.py:1:6: only texts"),
        ("x = 'a' * 3", "x.py:1:5"),
        ("x = ().__class__", "x.py:1:5: there is no '__class__'"),
        ("x = int('7')", "x.py:1:5: int and float take one number"),
        ("x = f'{1:>1000000000}'", "f-string"),
        ("x = '\\ud800'.foo", "there is no 'foo'"),
        ("x = 1\0", "cannot be read|not Python"),
    ],
)
def test_whatever_is_no_data_is_refused_where_it_stands(text: str, where: str) -> None:
    with pytest.raises(InvalidArgument, match=where) as refused:
        read(text)
    assert refused.value.reason == "CONFIG_SYNTAX"


@pytest.mark.parametrize(
    "text",
    [
        "x = 9 ** 9 ** 9",
        "x = 10 ** 12 * 10 ** 12\n" + "x = x * x\n" * 8,
        "x = 'aaaaaaaaaa'\n" + "x = x + x\n" * 40,
        "x = 'aaaaaaaaaa'\n" + "x = f'{x}{x}'\n" * 40,
        "x = [1]\n" + "x = x + x\n" * 40,
        "x = " + "[" * 5000 + "]" * 5000,
        "x = " + "-" * 50000 + "1",
        "x = '" + "a" * (2 << 20) + "'",
    ],
)
def test_a_hostile_text_costs_little(text: str) -> None:
    with pytest.raises(InvalidArgument):
        read(text)


def test_given_values_take_the_place_of_what_is_assigned() -> None:
    assert read("a = 1\nb = a + 1\na += 5", {"a": 10}) == {"a": 10, "b": 11}
