"""Attention outside the low-bit copy, in one launch, equals PyTorch's operations."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specache.device.page_kernels import RecentPart, TorchPages
from specache.kernels.torch.exact import add_sinks, softmax_sum
from specache.kernels.torch.exact import scores as exact_scores
from specache.kernels.triton import recent_backend
from specache.kernels.types import AttentionParams


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 69), min_size=1, max_size=2),
    heads=st.integers(1, 2),
    groups=st.integers(1, 9),
    rows=st.integers(1, 2),
    dim=st.sampled_from([20, 64, 80, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    softcap=st.sampled_from([None, 3.0]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_recent_attention_equals_pytorchs(counts, heads, groups, rows, dim, dtype, softcap, has_sinks, seed):
    generator = torch.Generator().manual_seed(seed)
    batch = len(counts)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query = random(batch, rows, heads * groups, dim).transpose(1, 2)  # as a model gives them: not contiguous
    keys, values = (random(batch, rows, heads, dim).transpose(1, 2) for _ in range(2))
    residual = random(batch, 2, heads, 70, dim)
    params = AttentionParams(0.2, softcap, random(heads * groups) if has_sinks else None)
    finite = torch.ones((), dtype=torch.bool)
    before = residual.clone()
    part = recent_backend.attend_recent(
        query, keys, values, residual, torch.tensor(counts), finite, params.scaling, params.softcap, params.sinks
    )
    assert finite
    for b, count in enumerate(counts):
        for i, new in enumerate((keys, values)):
            before[b, i, :, count] = new[b, :, 0]
    assert torch.equal(residual, before)
    for b, count in enumerate(counts):
        seen = [torch.cat([before[b, i, :, : count + 1], new[b, :, 1:]], dim=1) for i, new in enumerate((keys, values))]
        score = exact_scores(query[b], seen[0], params)
        if rows == 2:
            score[:, :, 0, -1] = -torch.inf
        out, own_lse = softmax_sum(score, seen[1])
        own_lse = own_lse.view(1, heads, groups, rows)
        expected = (out.view(heads, groups, rows, dim), add_sinks(own_lse, params)[0], own_lse[0])
        for found, wanted in zip(part, expected, strict=True):
            # weights of 16-bit rows are multiplied in two parts of their dtype
            torch.testing.assert_close(found[b], wanted, atol=1e-5 if dtype == torch.float32 else 1e-4, rtol=1e-5)
    low_bit_kv = torch.randn(batch, heads, groups, rows, dim, generator=generator), torch.randn(part[1].shape, generator=generator)
    low_bit_kv[1][0, 0, 0] = -torch.inf  # a copy in which nothing is seen
    joined = recent_backend.join(*low_bit_kv, *part, dtype)
    wanted = TorchPages.join(None, low_bit_kv, RecentPart(*part), dtype)
    last_bit = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]  # two sums may round apart
    torch.testing.assert_close(joined, wanted, atol=last_bit, rtol=last_bit)


def test_nan_and_infinity_in_the_real_token_are_reported():
    for bad in (torch.inf, -torch.inf, torch.nan):
        for which in range(2):
            finite = torch.ones(3, dtype=torch.bool)
            new = [torch.randn(2, 2, 2, 64) for _ in range(2)]
            new[which][1, 1, 0, 63] = bad
            residual = torch.zeros(2, 2, 2, 20, 64)
            query, counts = torch.randn(2, 4, 2, 64), torch.tensor([3, 4])
            recent_backend.attend_recent(query, *new, residual, counts, finite[1], 0.2, None, None)
            assert finite.tolist() == [True, False, True]
    new = [torch.randn(2, 2, 2, 64) for _ in range(2)]
    new[0][:, :, 1] = torch.nan  # the draft token is not kept
    finite = torch.ones(1, dtype=torch.bool)
    recent_backend.attend_recent(query, *new, residual, counts, finite[0], 0.2, None, None)
    assert finite.all()
