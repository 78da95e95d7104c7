"""Mixtures of experts: a draft token changes how the experts' products are grouped, no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch

from specache.kernels import dispatch
from tests.cache.test_invariants import EVERYTHING, force_guesses, run, settings
from tests.combinations import all_pairs
from tests.engine.test_model_families import FAMILIES, build
from tests.tiny import prompt

EXPERTS = ("qwen3-moe", "gpt-oss")
KERNELS = ("torch", "fastest")
LENGTH = 200


@pytest.fixture(scope="module", params=EXPERTS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(*FAMILIES[request.param])


@pytest.fixture(scope="module")
def undisturbed(model: Any) -> Callable[..., tuple[list[int], torch.Tensor]]:
    """Run once, with the drafts that the model makes, what several tests compare with."""

    @cache
    def answer(kernels: str, **changes: Any) -> tuple[list[int], torch.Tensor]:
        return run(model, prompt(LENGTH), settings(slow_tier="ram", **changes))[:2]

    return answer


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with dispatch.using("torch") if request.param == "torch" else nullcontext():
        yield request.param


@pytest.fixture
def close(kernels: str) -> float:
    """Return the tolerance of logits. The C++ kernels round queries and weights to bytes."""
    return 1e-5 if kernels == "torch" else 1e-3  # measured with the latter: 2e-4


@pytest.mark.parametrize(("bits", "seed", "kernels"), all_pairs([1, 2], [1, 2], KERNELS), indirect=["kernels"])
def test_verified_does_not_depend_on_the_draft_token(model, monkeypatch, undisturbed, bits, seed, kernels, close):
    answer, expected = undisturbed(kernels, policy="verified", bits=bits)
    force_guesses(monkeypatch, seed)
    tokens, logits, wrong = run(model, prompt(LENGTH), settings(policy="verified", slow_tier="ram", bits=bits))
    assert wrong["guess_rate"] < 0.1
    assert tokens == answer
    assert (logits - expected).abs().max() < close


def test_fetching_every_pair_makes_every_draft_token_right(model):
    assert run(model, prompt(LENGTH), settings(policy="verified", slow_tier="ram", top_k=EVERYTHING))[2]["guess_rate"] == 1.0


@pytest.mark.parametrize("bits", [1, 2])
def test_verified_gives_the_answer_of_on_demand(undisturbed, bits, kernels, close):
    answer, expected = undisturbed(kernels, policy="on-demand", bits=bits)
    tokens, logits = undisturbed(kernels, policy="verified", bits=bits)
    assert tokens == answer
    assert (logits - expected).abs().max() < 10 * close  # measured: 1e-5 and 2e-3


def test_speculative_depends_on_the_draft_token(model, monkeypatch):
    """Otherwise the tests above could not fail."""
    config = settings(policy="speculative", slow_tier="ram")
    answer, expected, _ = run(model, prompt(LENGTH), config)
    force_guesses(monkeypatch, 1)
    assert (run(model, prompt(LENGTH), config, answer=answer)[1] - expected).abs().max() > 1e-3
