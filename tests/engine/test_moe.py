"""Mixtures of experts: a draft token changes how the experts' products are grouped, no more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from specache.kernels import dispatch
from tests.cache.test_invariants import EVERYTHING, force_guesses, run, settings
from tests.engine.test_model_families import FAMILIES, build
from tests.tiny import prompt

EXPERTS = ("qwen3-moe", "gpt-oss")
LENGTH = 200


@pytest.fixture(scope="module", params=EXPERTS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(*FAMILIES[request.param])


@pytest.fixture(params=["torch", "fastest"])
def close(request: pytest.FixtureRequest) -> Iterator[float]:
    """Return the tolerance of logits. The C++ kernels round queries and weights to bytes."""
    if request.param == "fastest":
        yield 1e-3  # measured: 2e-4
        return
    with dispatch.using("torch"):
        yield 1e-5


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("seed", [1, 2])
def test_verified_does_not_depend_on_the_draft_token(model, monkeypatch, bits, seed, close):
    config = settings(policy="verified", slow_tier="ram", bits=bits)
    answer, expected, _ = run(model, prompt(LENGTH), config)
    force_guesses(monkeypatch, seed)
    tokens, logits, wrong = run(model, prompt(LENGTH), config)
    assert wrong["guess_rate"] < 0.1
    assert tokens == answer
    assert (logits - expected).abs().max() < close


def test_fetching_every_pair_makes_every_draft_token_right(model):
    assert run(model, prompt(LENGTH), settings(policy="verified", slow_tier="ram", top_k=EVERYTHING))[2]["guess_rate"] == 1.0


@pytest.mark.parametrize("bits", [1, 2])
def test_verified_gives_the_answer_of_on_demand(model, bits, close):
    config = {"slow_tier": "ram", "bits": bits}
    answer, expected, _ = run(model, prompt(LENGTH), settings(policy="on-demand", **config))
    tokens, logits, _ = run(model, prompt(LENGTH), settings(policy="verified", **config))
    assert tokens == answer
    assert (logits - expected).abs().max() < 10 * close  # measured: 1e-5 and 2e-3


def test_speculative_depends_on_the_draft_token(model, monkeypatch):
    """Otherwise the tests above could not fail."""
    config = settings(policy="speculative", slow_tier="ram")
    answer, expected, _ = run(model, prompt(LENGTH), config)
    force_guesses(monkeypatch, 1)
    assert (run(model, prompt(LENGTH), config, answer=answer)[1] - expected).abs().max() > 1e-3
