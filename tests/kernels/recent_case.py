"""Attention outside the low-bit copy beside PyTorch's results, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specache.device.page_kernels import RecentPart, TorchPages
from specache.kernels.torch.exact import add_sinks, softmax_sum
from specache.kernels.torch.exact import scores as exact_scores
from specache.kernels.triton import recent_backend
from specache.kernels.types import AttentionParams


def check_recent(
    device: torch.device,
    counts: Sequence[int],
    heads: int,
    groups: int,
    rows: int,
    dim: int,
    dtype: torch.dtype,
    softcap: float | None,
    has_sinks: bool,
    seed: int,
) -> None:
    """Compare the kernels for tokens outside the low-bit copy with PyTorch's operations."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(counts)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    query = random(batch, rows, heads * groups, dim).transpose(1, 2)  # as a model gives them: not contiguous
    keys, values = (random(batch, rows, heads, dim).transpose(1, 2) for _ in range(2))
    residual = random(batch, 2, heads, 70, dim)
    params = AttentionParams(0.2, softcap, random(heads * groups) if has_sinks else None)
    finite = torch.ones((), dtype=torch.bool, device=device)
    before = residual.clone()
    part = recent_backend.attend_recent(
        query, keys, values, residual, torch.tensor(counts, device=device), finite, params.scaling, params.softcap, params.sinks
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
    low_bit_kv = low_bit_kv[0].to(device), low_bit_kv[1].to(device)
    low_bit_kv[1][0, 0, 0] = -torch.inf  # a copy in which nothing is seen
    joined = recent_backend.join(*low_bit_kv, *part, dtype)
    wanted = TorchPages.join(None, low_bit_kv, RecentPart(*part), dtype)
    last_bit = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]  # two sums may round apart
    torch.testing.assert_close(joined, wanted, atol=last_bit, rtol=last_bit)
