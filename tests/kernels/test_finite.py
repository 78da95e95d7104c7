"""NaN and infinity are found wherever they are; large finite numbers are not mistaken for them."""

from __future__ import annotations

import pytest
import torch

from specache.kernels.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_nan_or_infinity_is_found(dtype, bad):
    for place in (0, 100, 511):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert all_finite(x)
        x.flatten()[place] = bad
        assert not all_finite(x)


def test_opposite_infinities_do_not_cancel():
    assert not all_finite(torch.tensor([float("inf"), float("-inf"), 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_finite_numbers_whose_sum_overflows_are_finite(dtype):
    assert all_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))


def test_an_empty_tensor_is_finite():
    assert all_finite(torch.empty(2, 0))
