"""Templates that mean harm come to an end, and cost little."""

from __future__ import annotations

import time

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.finetune.sandbox import Bounded

ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% set x = range(99999)|list|sort %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) if n else '' }}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [range(99999)] recursive %}{{ loop(range(99999)) if loop.depth < 4 }}{% endfor %}",
]
GREEDY = [
    "{% set ns = namespace(x='x') %}{% for n in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for n in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for n in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{{ 'x' * 99999999999 }}",
    "{{ 99999999999 * [1] }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 2 ** 99999999 }}",
]
FAIR = [
    "{% for m in ms %}{{ loop.index }}{{ m.a ~ '-' ~ loop.last }}{{ loop.length }}{% else %}none{% endfor %}",
    "{% for m in ms if m.a != 2 %}{{ loop.index0 }}{{ m.a * 2 + 1 }}{{ 'ab' * 2 }}{{ 2 ** 3 }}{% endfor %}",
    "{% macro f(x, y=1) %}[{{ x }}{{ y }}]{% endmacro %}{{ f(1) }}{{ f('a' + 'b', y=2) }}{{ [1] + [2] }}",
    "{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}{{ (1, 2)|sum }}{{ 'a'|upper }}",
    "{% for a in [[1, [2]]] recursive %}{{ a if a is number else loop(a) }}{% endfor %}",
]


@pytest.mark.parametrize("source", ENDLESS + GREEDY)
def test_what_does_not_end_is_ended(source: str) -> None:
    began = time.thread_time()
    with pytest.raises((TemplateError, RecursionError)):
        Bounded().from_string(source).render()
    assert time.thread_time() - began < 10


@pytest.mark.parametrize("source", FAIR)
def test_what_is_fair_says_the_same(source: str) -> None:
    names = {"ms": [{"a": n} for n in range(4)]}
    plain = ImmutableSandboxedEnvironment().from_string(source).render(names)
    template = Bounded().from_string(source)
    assert template.render(names) == plain == template.render(names)


def test_each_rendering_has_its_own_count() -> None:
    template = Bounded().from_string("{% for a in range(90000) %}{% endfor %}done")
    assert {template.render() for _ in range(15)} == {"done"}
