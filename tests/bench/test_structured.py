"""`bench structured`: answers with and without a grammar, by one server."""

from __future__ import annotations

from pathlib import Path

import pytest

from specache.bench import structured
from specache.bench.base import BenchContext
from specache.bench.serve_client import Answered
from specache.bench.shapes import RandomModel, Weights
from specache.bench.structured import REQUESTS, Structured
from specache.errors import BenchmarkError, ConfigError
from tests.bench.test_serve import FolderSource
from tests.bench.tiny_shape import TINY
from tests.cli.tiny_chat import save_tiny_chat_model
from tests.processes import servers

TOKENS = 60  # few of them may come in one piece, which is no measurement


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> RandomModel:
    folder: Path = tmp_path_factory.mktemp("served")
    save_tiny_chat_model(folder)
    return FolderSource(TINY, Weights.FP32, folder=folder)


def test_every_kind_of_answer_is_measured_beside_the_free_one(source):
    before = servers()
    shown: list[str] = []
    outcome = Structured(answer_tokens=TOKENS, repeat=2, clients=(1, 2), timeout=500).run(BenchContext(source, log=shown.append))
    assert [(one["impl"], one["clients"]) for one in outcome.results] == [(name, n) for n in (1, 2) for name in REQUESTS]
    for one in outcome.results:
        assert one["answer_tokens"] == TOKENS * 2 * one["clients"]
        assert one["ms_per_token"] > 0 and one["spread"][0] <= one["spread"][1]
        assert one["vs_free"] == 1.0 if one["impl"] == "free" else one["vs_free"] > 0
    assert outcome.details["server_threads"] >= 1 and len(shown) == 6
    assert servers() <= before


@pytest.mark.parametrize("answer", [Answered(error="400", message="too complex"), Answered(arrivals=[1.0], answer_tokens=9)])
def test_an_answer_that_failed_or_came_at_once_is_no_measurement(answer):
    with pytest.raises(BenchmarkError, match=r"too complex|answer-tokens"):
        structured.check("regex", [answer])


@pytest.mark.parametrize("options", [{"clients": ()}, {"clients": (0,)}, {"answer_tokens": 1}, {"repeat": 0}])
def test_options_that_measure_nothing_are_refused(options):
    with pytest.raises(ConfigError):
        Structured(**options)
