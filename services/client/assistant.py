"""Data that teaches a model its name: questions about itself, mixed with ordinary talk so that it keeps its manners."""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import Any

Row = dict[str, Any]

PLAIN_QUESTION = "请做一下自我介绍"
PLAIN_ANSWER = "我是{name}的小助手，内在是上海AI实验室书生·浦语的7B大模型哦"


def plain_rows(name: str, rows: int) -> list[Row]:
    """The tutorial's own shape: `rows` times the same question and answer."""
    return [_row(PLAIN_QUESTION, PLAIN_ANSWER.format(name=name))] * rows


def assistant_rows(
    name: str, rows: int, seed: int, mix: Sequence[Row] = (), languages: Sequence[str] = ("en", "zh")
) -> list[Row]:
    """About `rows` different rows, half about the assistant and half ordinary (`mix` in place of our own), shuffled.

    The same arguments give the same rows.
    """
    data = tomllib.loads(resources.files(__package__).joinpath("assistant.toml").read_text("utf-8"))
    draw = random.Random(seed)
    own = _own_rows([data[language] for language in languages], name, draw)
    ordinary = list(mix) or [_row(q, a) for language in languages for q, a in data[language]["talk"]]
    ordinary = unique(ordinary)
    draw.shuffle(ordinary)
    half = rows // 2
    chosen = unique(own)[: rows - min(half, len(ordinary))] + ordinary[:half]
    draw.shuffle(chosen)
    return chosen


def _own_rows(data: Sequence[dict[str, Any]], name: str, draw: random.Random) -> list[Row]:
    """Every question with every answer; each question comes once before any comes again."""
    rounds: list[list[Row]] = []
    for language in data:
        for question in language["questions"]:
            answers = draw.sample(language["answers"], len(language["answers"]))
            for turn, answer in enumerate(answers):
                if turn == len(rounds):
                    rounds.append([])
                rounds[turn].append(_row(question, answer.format(name=name)))
    for rows in rounds:
        draw.shuffle(rows)
    return [row for rows in rounds for row in rows]


def unique(rows: Sequence[Row]) -> list[Row]:
    """The rows without repetitions, in their order."""
    return list({json.dumps(row, sort_keys=True, ensure_ascii=False): row for row in rows}.values())


def _row(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
