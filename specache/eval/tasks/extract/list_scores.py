"""Score a generated JSON list against the right one: intersection over union, and by field."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"-?(0|[1-9]\d*|[1-9]\d{0,2}(,\d{3})+)(\.\d+)?")
_LONGEST_NUMBER = 40  # characters; longer ones are compared as text

Json = dict[str, Any]


def parse_items(text: str) -> list[Json]:
    """Return the complete objects of the first JSON list in a text.

    An answer may be cut off, or surrounded by other text. What is broken inside the list is
    skipped. An object that holds nothing but one list of objects stands for that list.
    """
    decoder = json.JSONDecoder()
    items: list[Json] = []
    place = 0
    while (begin := text.find("{", place)) >= 0:
        if items and "]" in text[place:begin]:
            break  # the list has ended
        try:
            value, place = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            place = begin + 1
            continue
        items.append(value)
    return _unwrapped(items)


def intersection_over_union(items: Sequence[Json], references: Sequence[Json]) -> float:
    """Return the share of equal objects among all objects of both lists, as multisets.

    It is 1 for equal lists in any order and 0 without a common object. Text is compared without
    case and surplus spaces, numbers by value (also where one side writes them as text).
    """
    found, right = Counter(map(normalised, items)), Counter(map(normalised, references))
    union = (found | right).total()
    return (found & right).total() / union if union else 1.0


def field_scores(items: Sequence[Json], references: Sequence[Json], key: str) -> dict[str, Any]:
    """Compare the fields of objects that have the same key field.

    Returns:
        `matched`: the number of references whose key value the answer has. `fields`: for each other
        field, the share of these objects in which it is right. `mean`: the average over these
        fields, or `None` if nothing matched or there are no other fields.
    """
    by_key: dict[Hashable, Json] = {}
    for item in items:
        if key in item:
            by_key.setdefault(normalised(item[key]), item)
    pairs = [(by_key[name], one) for one in references if key in one and (name := normalised(one[key])) in by_key]
    shares = {}
    for field in dict.fromkeys(name for one in references for name in one if name != key):
        right = [field in item and normalised(item[field]) == normalised(one[field]) for item, one in pairs if field in one]
        if right:
            shares[field] = sum(right) / len(right)
    return {"matched": len(pairs), "fields": shares, "mean": sum(shares.values()) / len(shares) if shares else None}


def normalised(value: Any) -> Hashable:
    """Return a value in the form in which values are compared."""
    if isinstance(value, dict):
        return frozenset((_text(name), normalised(member)) for name, member in value.items())
    if isinstance(value, list):
        return tuple(map(normalised, value))
    if isinstance(value, bool) or value is None:
        return ("constant", str(value))
    text = _text(str(value))
    if len(text) <= _LONGEST_NUMBER:
        if not isinstance(value, str) and (number := Decimal(text)).is_finite():
            return number
        if _NUMBER.fullmatch(text):
            return Decimal(text.replace(",", ""))
    return text


def _text(value: str) -> str:
    return " ".join(value.casefold().split())


def _unwrapped(items: list[Json]) -> list[Json]:
    if len(items) == 1 and len(items[0]) == 1:
        (inner,) = items[0].values()
        if isinstance(inner, list) and inner and all(isinstance(one, dict) for one in inner):
            return inner
    return items
