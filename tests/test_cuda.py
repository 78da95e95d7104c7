"""The RAM tier of a model on CUDA: pinned rows, copied on a stream of their own. Needs an NVIDIA GPU."""

from __future__ import annotations

import pytest
import torch

import specache
from tests.tiny import llama, prompt

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("policy", ["verified", "speculative", "on-demand", "previous"])
def test_fetching_everything_equals_the_stock_cache(policy):
    model, ids = llama().cuda(), prompt(200).cuda()
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    config = specache.SpeCacheConfig(policy=policy, group_size=16, residual=16, top_k=10**6, prefill_chunk=70)
    assert torch.equal(specache.generate(model, ids, config=config, max_new_tokens=30, do_sample=False), expected)


def test_the_slow_tier_is_pinned_host_memory_and_in_place_is_refused():
    model, ids = llama().cuda(), prompt(200).cuda()
    with specache.SpeCache(model) as cache:
        specache.prefill(model, ids, cache=cache)
        keys, _ = cache.sequences[0].tier.read(0, 0, 10)
        assert keys.device.type == "cpu"
        assert keys.is_pinned()
    with pytest.raises(specache.ConfigError, match="slow_tier='ram'"):
        specache.SpeCache(model, specache.SpeCacheConfig(slow_tier="ram-inplace"))


def test_verified_does_not_depend_on_the_hot_set():
    model, ids = llama().cuda(), prompt(300).cuda()
    answers = [
        specache.generate(model, ids, config=specache.SpeCacheConfig(top_k=8, hot_set=size), max_new_tokens=30, do_sample=False)
        for size in (0.0, 1.0)
    ]
    assert torch.equal(*answers)
