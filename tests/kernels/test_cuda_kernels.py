"""The RAM tier of a model on CUDA: pinned rows, copied on a stream of their own. Needs an NVIDIA
GPU.
"""

from __future__ import annotations

import pytest
import torch

import specache
from specache.engine import static_decoder
from tests.device.static_running import ragged
from tests.engine.test_model_families import FAMILIES, build
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


@pytest.mark.filterwarnings("error::RuntimeWarning")  # nothing but graphs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", ["verified", "speculative", "on-demand", "previous", "none"])
def test_replayed_graphs_give_the_tokens_of_launched_kernels(policy, family, dtype):
    """A batch of different lengths quantises groups and outgrows its buffers; full attention and
    hybrid, all and 16 bits.
    """
    ids, mask = ragged(300, 180)
    model = build(*FAMILIES[family]).to(dtype).cuda()
    answers = []
    for cuda_graph in (True, False):
        config = specache.SpeCacheConfig(policy=policy, group_size=16, residual=16, top_k=8, cuda_graph=cuda_graph)
        answers.append(
            specache.generate(model, ids.cuda(), attention_mask=mask.cuda(), config=config, max_new_tokens=120, do_sample=False)
        )
    assert torch.equal(*answers)


def test_steps_over_static_buffers_equal_the_ordinary_ones(monkeypatch):
    """Logits on the same tokens."""
    model, (ids, mask) = llama().cuda(), ragged(300, 180)
    arguments = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    config = specache.SpeCacheConfig(policy="verified", group_size=16, residual=16, top_k=8)
    static = specache.generate(model, ids.cuda(), attention_mask=mask.cuda(), config=config, **arguments)
    monkeypatch.setattr(static_decoder, "SETTINGS", static_decoder.StaticSettings(devices=()))
    ordinary = specache.generate(model, ids.cuda(), attention_mask=mask.cuda(), config=config, **arguments)
    same = (static.sequences == ordinary.sequences).all(0).int().cummin(0).values[300:]
    steps = int(same.sum())  # near equals may be ordered differently, and a token then be another
    assert steps > 5
    ours, theirs = torch.stack(static.logits[:steps]), torch.stack(ordinary.logits[:steps])
    assert (ours - theirs).abs().max() < 1e-2
