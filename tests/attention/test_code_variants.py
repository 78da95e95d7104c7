"""The study's simulation is the method: what it decodes is what the cache decodes, and every
variant of the list runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.code_variants import TWO, VARIANTS, Kivi, Variant, log_probs
from specache.engine.attention_hook import attached
from specache.engine.decoder import Decoder
from specache.eval.prefilled import Prefilled
from tests.engine.test_model_families import FAMILIES, build
from tests.tiny import llama, prompt

LENGTH, NEW = 340, 12


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def start(request: pytest.FixtureRequest) -> Iterator[Prefilled]:
    model = llama() if request.param == "llama" else build(*FAMILIES["gemma3"])
    prefilled = Prefilled(model, prompt(LENGTH)[0].tolist(), all_queries=True)
    yield prefilled
    prefilled.close()


def following() -> list[int]:
    return prompt(NEW, seed=1)[0].tolist()


def decoded(start: Prefilled, **settings: object) -> Tensor:
    """Log-probabilities [n, V] of the real cache with every wanted pair swapped in."""
    with start.cache.fork(policy="on-demand", **settings) as cache, torch.no_grad(), attached(start.model):
        cache.sequences[0].prepare_decode()
        decoder = Decoder(start.model, cache)
        return torch.cat([decoder.step(cache.sequences, [token], None).real for token in following()]).log_softmax(-1)


def test_without_a_variant_the_model_is_unchanged(start):
    ids = torch.tensor([start.token_ids + following()])
    with torch.no_grad():
        expected = start.model(ids).logits[0, LENGTH:].log_softmax(-1)
    assert torch.allclose(log_probs(start.model, start, following(), None), expected, atol=1e-3)


@pytest.mark.parametrize("code", [TWO, Kivi(2)])
def test_a_variant_that_was_built_decodes_as_the_cache(start, code):
    name = "rotated" if code is TWO else "kivi"
    expected = decoded(start, code=name, bits=2, residual=128, top_k=8)
    actual = log_probs(start.model, start, following(), Variant(code, 8, residual=128))
    exact = log_probs(start.model, start, following(), None)
    assert (actual - expected).abs().mean() < 0.1 * (actual - exact).abs().mean()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs(start, name):
    found = log_probs(start.model, start, following(), VARIANTS[name])
    assert found.shape == (NEW, start.model.config.vocab_size) and found.isfinite().all()
    assert 0 < VARIANTS[name].memory(LENGTH, 64) < 1
