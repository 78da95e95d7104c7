"""Attention outside the low-bit copy, in one launch, equals PyTorch's operations."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specache.kernels.triton import recent_backend
from tests.kernels.recent_case import check_recent


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
    check_recent(torch.device("cpu"), counts, heads, groups, rows, dim, dtype, softcap, has_sinks, seed)


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
