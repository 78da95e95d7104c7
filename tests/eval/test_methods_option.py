"""`--methods`: what it accepts, the labels of methods, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import pytest

from specache.config import Policy
from specache.errors import ConfigError
from specache.eval import catalogue
from specache.eval.methods.base import Method, Session
from specache.eval.methods_option import parse_method, parse_methods
from specache.eval.prefilled import Prefilled
from specache.eval.setting_fields import from_json, parse


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Painted(Method):
    name: ClassVar[str] = "painted"
    summary: ClassVar[str] = ""
    needs_all_queries: ClassVar[bool] = False
    colour: Colour = Colour.RED
    budget: float = 0.2
    exact: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.budget > 1:
            raise ValueError("budget must be at most 1")

    def settings(self) -> dict[str, Any]:
        return {"colour": str(self.colour), "budget": self.budget, "exact": self.exact, "limit": self.limit}

    def start(self, prompt: Prefilled) -> Session:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def painted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue.METHODS, "painted", f"{__name__}:Painted")


def labels(text: str) -> list[str]:
    return [method.label for method in parse_methods(text)]


def test_labels_name_what_differs_from_the_defaults():
    assert labels("full, specache ,kivi") == ["full", "specache", "kivi"]
    assert labels("specache:policy=speculative:bits=1") == ["specache bits=1 policy=speculative"]
    assert labels("specache:bits=1:top_k=256:long_top_k=512:residual=256") == ["specache bits=1"]  # those of 1 bit
    assert labels("specache:top_k=64:long_top_k=64") == labels("specache:top_k=64") == ["specache top_k=64"]
    assert labels("specache:top_k=128") == ["specache long_top_k=128"]  # a long sequence selects 256 by default
    assert labels("specache:bits=1:top_k=128") == ["specache bits=1 top_k=128"]
    assert labels("kivi:bits=1:residual=128,kivi:residual=64") == ["kivi bits=1", "kivi residual=64"]


def test_values_have_the_types_of_the_fields():
    config = parse_method("specache:k=32:g=32:r=128:b=4:policy=on-demand:hot-set=0.04").method.config
    assert (config.top_k, config.group_size, config.residual, config.bits, config.hot_set) == (32, 32, 128, 4, 0.04)
    assert config.policy is Policy.ON_DEMAND
    assert parse_method("specache:hot_set=1000000").method.config.hot_set == 1_000_000
    assert parse_method("painted:colour=blue:budget=1:exact=yes:limit=none").method == Painted(Colour.BLUE, 1.0, True, None)
    assert parse_method("painted:limit=7").label == "painted limit=7"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nonsense", "no method 'nonsense'. Known: full, specache"),
        ("specache:speed=1", "no setting 'speed'. It has: bits"),
        ("specache:slow_tier=ram-inplace", "no setting 'slow_tier'"),
        ("full:bits=1", "'full' has no setting 'bits'. It has none."),
        ("specache:bits=3", "bits must be one of 1, 2, 4"),
        ("specache:bits=two", "specache:bits must be a whole number, got 'two'"),
        ("specache:policy=fast", "must be one of auto, verified, speculative"),
        ("painted:colour=green", "must be one of red, blue"),
        ("painted:exact=perhaps", "must be true or false"),
        ("painted:budget=2", "budget must be at most 1"),
        ("painted:budget=nan", "must be a number"),
        ("specache:bits", "field=value"),
        ("specache:bits=", "field=value"),
        ("specache:bits=1:b=2", "has bits twice"),
        ("", "at least one method"),
        ("kivi,full,kivi", "the same method twice: 'kivi'"),
        ("specache,specache:bits=2", "the same method twice: 'specache'"),
        ("specache:policy=on-demand,specache", "the same method twice"),
    ],
)
def test_invalid_methods_are_refused(text: str, expected: str):
    with pytest.raises(ConfigError) as error:
        parse_methods(text)
    assert expected in str(error.value)


def test_tuples_and_paths_are_comma_separated():
    assert parse("1, 2,3", tuple[int, ...], "x") == (1, 2, 3)
    assert parse("a.txt,b.txt", tuple[Path, ...], "x") == (Path("a.txt"), Path("b.txt"))
    assert parse("", tuple[str, ...], "x") == ()
    with pytest.raises(ConfigError, match="--lengths must be a whole number, got 'long'"):
        parse("1,long", tuple[int, ...], "--lengths")


@dataclass(frozen=True)
class Options:
    lengths: tuple[int, ...] = (1,)
    files: tuple[Path, ...] = ()
    text: Path | None = None


def test_settings_are_restored_from_json():
    document = {"lengths": [4, 8], "files": ["a"], "text": "b", "gone": 1}
    assert from_json(Options, document) == Options((4, 8), (Path("a"),), Path("b"))
    assert from_json(Options, {"text": None}) == Options()
