"""Exact attention of one stretch of keys, in whatever layout its operands come."""

from __future__ import annotations

import warnings

import pytest
import torch

from specache.attention import dense as exact
from specache.attention.dense import attend_part, merge
from specache.kernels.types import AttentionParams


def _operands(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(heads, 9, 16, generator=generator).to(dtype) for heads in (4, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_elements_of_a_row_need_not_be_neighbours(dtype, which):
    operands = _operands(dtype)
    params = AttentionParams(scaling=0.25)
    expected = attend_part(*operands, params, causal=True)
    operands[which] = operands[which].transpose(1, 2).contiguous().transpose(1, 2)  # column by column
    for found, wanted in zip(attend_part(*operands, params, causal=True), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_two_parts_are_joined_as_one_attention():
    query, keys, values = _operands(torch.float32)
    params = AttentionParams(scaling=0.25)
    whole, lse = attend_part(query, keys, values, params)
    parts = [attend_part(query, keys[:, s], values[:, s], params) for s in (slice(0, 4), slice(4, None))]
    torch.testing.assert_close(merge(parts), (whole, lse))


def test_a_part_that_sees_nothing_adds_nothing():
    query, keys, values = _operands(torch.float32)
    part = attend_part(query, keys, values, AttentionParams(scaling=0.25))
    nothing = torch.zeros_like(part[0]), torch.full_like(part[1], -torch.inf)
    torch.testing.assert_close(merge([part, nothing]), part)
    torch.testing.assert_close(merge([nothing, part]), part)
    out, lse = merge([nothing, nothing])
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_failing_flash_attention_warns_once_and_is_not_used_again(monkeypatch):
    """As on a GPU whose PyTorch has no kernel for it."""
    monkeypatch.setattr(exact, "_flash_fails", False)
    monkeypatch.setattr(exact, "_can_flash", lambda *operands: True)
    params = AttentionParams(scaling=0.25, softcap=None)
    query, keys, values = _operands(torch.float32)
    with pytest.warns(RuntimeWarning, match="flash attention failed"):  # there is none on the CPU
        assert exact._flash_cuda(query, keys, values, params.scaling, True) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert exact._flash_cuda(query, keys, values, params.scaling, True) is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_flash_attention_on_a_gpu_is_the_plain_one(dtype, causal, groups):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2 * groups, 300, 64), (2, 300, 64), (2, 300, 64)]
    operands = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    found = exact._flash_cuda(*(x.cuda() for x in operands), 0.125, causal)
    assert found is not None
    expected = attend_part(*(x.float() for x in operands), AttentionParams(scaling=0.125), causal=causal)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=2e-2, rtol=2e-2)
