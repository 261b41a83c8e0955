from __future__ import annotations

from typing import Any

import pytest

from services.common.paging import page
from services.finetune.errors import InvalidArgument

ITEMS = [{"name": f"n{n:02}", "create_time": f"t{9 - n % 3}", "labels": {"team": "ab"[n % 2]}} for n in range(10)]


def paged(items: list[dict[str, Any]], **given: Any) -> tuple[list[str], str]:
    words = {"page_size": 0, "page_token": "", "filter": "", "order_by": "", **given}
    found, token = page(items, fields=lambda i: i, orders=("name", "create_time"), default_order="name", **words)
    return [i["name"] for i in found], token


@pytest.mark.parametrize("order", ["", "name desc", "create_time", "create_time desc", "create_time asc"])
def test_pages_together_are_the_whole_list(order: str) -> None:
    whole, end = paged(ITEMS, order_by=order)
    assert end == "" and sorted(whole) == [i["name"] for i in ITEMS]
    found, token = paged(ITEMS, order_by=order, page_size=3)
    while token:
        more, token = paged(ITEMS, order_by=order, page_size=3, page_token=token)
        found += more
    assert found == whole


def test_a_deleted_item_does_not_break_the_next_page() -> None:
    first, token = paged(ITEMS, page_size=3)
    left = [i for i in ITEMS if i["name"] != first[-1]]
    assert paged(left, page_size=3, page_token=token)[0] == ["n03", "n04", "n05"]


@pytest.mark.parametrize(
    ("filter", "count"),
    [
        ('labels.team = "a"', 5),
        ("labels.team=a AND name = n02", 1),
        ('name="x AND y"', 0),
        ("labels.nobody = a", 0),
        (" ", 10),
    ],
)
def test_filters(filter: str, count: int) -> None:
    assert len(paged(ITEMS, filter=filter)[0]) == count


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"filter": "name"}, "FILTER_MALFORMED"),
        ({"filter": "name = a AND"}, "FILTER_MALFORMED"),
        ({"filter": "name = a OR name = b"}, "FILTER_MALFORMED"),
        ({"filter": 'name = "a'}, "FILTER_MALFORMED"),
        ({"page_token": "nonsense"}, "PAGE_TOKEN_MALFORMED"),
        ({"page_token": "MQ=="}, "PAGE_TOKEN_MALFORMED"),
        ({"page_token": "é"}, "PAGE_TOKEN_MALFORMED"),
        ({"order_by": "size"}, "ORDER_BY_UNKNOWN"),
        ({"order_by": "name down"}, "ORDER_BY_UNKNOWN"),
    ],
)
def test_what_cannot_be_read_is_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        paged(ITEMS, **given)
    assert caught.value.reason == reason


def test_a_token_of_another_order_is_refused() -> None:
    _, token = paged(ITEMS, page_size=2)
    with pytest.raises(InvalidArgument):
        paged(ITEMS, page_size=2, page_token=token, order_by="name desc")
