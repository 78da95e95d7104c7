"""Plain-PyTorch kernels over packed codes: portable, device-agnostic, and the fallback of every faster backend.

Codes are unpacked a block of pages at a time, never for a whole layer; what a code means is the business of `torch_kivi` and
`torch_rotated`. Symbols: see `specache.kernels.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specache.config import Code
from specache.kernels.blocks import blocks, pieces
from specache.kernels.torch import kivi as torch_kivi
from specache.kernels.torch import rotated as torch_rotated
from specache.kernels.types import LowBitKV

_CODES: dict[Code, Any] = {Code.KIVI: torch_kivi, Code.ROTATED: torch_rotated}


def quantise(keys: Tensor, values: Tensor, copy: LowBitKV, start: int) -> None:
    """Quantise and pack tokens `[start, start + n)` into the copy's pages."""
    done = 0
    for run, offset, count in pieces(copy, start, keys.shape[1]):
        _CODES[copy.code].quantise(keys[:, done : done + count], values[:, done : done + count], run, offset, copy)
        done += count


def score(
    query: Tensor,
    copies: Sequence[LowBitKV],
    lengths: Sequence[int],
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Scores of every low-bit key, without forming a key."""
    batch, num_heads, n, dim = query.shape
    heads = copies[0].num_kv_heads
    grouped = query.float().reshape(batch, heads, num_heads // heads * n, dim)  # [B, Hkv, G n, D]
    scores = grouped.new_full((*grouped.shape[:3], max(lengths)), -torch.inf)
    for b, (copy, length) in enumerate(zip(copies, lengths, strict=True)):
        if not length:
            continue
        scorer = _CODES[copy.code].QueryScorer(grouped[b], copy)
        for block, first, count in blocks(copy, length):
            scores[b, :, :, first : first + count] = scorer(block)[..., :count]
    scores.mul_(scaling)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
        for b, length in enumerate(lengths):
            scores[b, :, :, length:] = -torch.inf
    return scores.unflatten(2, (-1, n))  # [B, Hkv, G, n, S]


def rescore(query: Tensor, scores: Tensor, positions: Tensor, rows: Tensor, scaling: float, softcap: float | None) -> None:
    """Replace the low-bit scores of fetched positions by exact ones, in place."""
    exact = exact_scores(query, scores, rows, scaling, softcap)
    b, h, r, j = (positions >= 0).nonzero(as_tuple=True)
    scores[b, h, :, r, positions[b, h, r, j]] = exact[b, h, :, r, j]


def exact_scores(query: Tensor, scores: Tensor, rows: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Scores [B, Hkv, G, n, k] of the keys in rows [B, Hkv, n, k, 2D]; `scores` tells the shape."""
    dim = query.shape[-1]
    grouped = query.float().reshape(*scores.shape[:4], dim)
    keys = rows[..., :dim].float()  # [B, Hkv, n, k, D]
    exact = torch.einsum("bhgnd,bhnkd->bhgnk", grouped, keys) * scaling
    return exact if softcap is None else (exact / softcap).tanh_() * softcap


def select(scores: Tensor, rest_lse: Tensor, lengths: Sequence[int], k: int) -> Tensor:
    """The `k` largest probabilities per KV head and row, averaged over the `G` query heads.

    Linear in `S`: everything above the k-th largest value, then its equals from the lowest position up.
    """
    batch, heads, _, n, size = scores.shape
    k = min(k, size)
    if k == 0:
        return torch.empty(batch, heads, n, 0, dtype=torch.long, device=scores.device)
    mass = mean_probabilities(scores, rest_lse)  # [B, Hkv, n, S]
    for b, length in enumerate(lengths):
        mass[b, ..., length:] = -1.0
    positions = largest(mass, k).nonzero()[:, -1].reshape(*mass.shape[:3], k)
    limits = torch.tensor(lengths, device=positions.device).view(-1, 1, 1, 1)
    return positions.where(positions < limits, -1)


def largest(mass: Tensor, k: int) -> Tensor:
    """Which `k` of the last dimension are the largest, of equals the first ones: bool of the same shape."""
    threshold = mass.topk(k, dim=-1).values[..., -1:]  # the k-th largest
    above = mass > threshold
    level = mass == threshold
    return above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def mean_probabilities(scores: Tensor, rest_lse: Tensor) -> Tensor:
    """Mean over G of softmax probabilities; one query head of a group at a time, to hold no second copy of the scores."""
    groups = scores.shape[2]
    mass = torch.zeros_like(scores[:, :, 0])  # [B, Hkv, n, S]
    for g in range(groups):
        peak = scores[:, :, g].amax(-1, keepdim=True).clamp(min=-1e30)
        weights = (scores[:, :, g] - peak).exp_()
        total = torch.logaddexp(peak + weights.sum(-1, keepdim=True).log(), rest_lse[:, :, g, :, None])
        mass.addcmul_(weights, (peak - total).exp() / groups)
    return mass


def attend(
    scores: Tensor, positions: Tensor, rows: Tensor, copies: Sequence[LowBitKV], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Softmax over the copy and the weighted sum of its values, fetched positions read from `rows` instead."""
    batch, heads, groups, n, size = scores.shape
    dim = copies[0].head_dim
    if size == 0:
        shape = (batch, heads, groups, n)
        return scores.new_zeros(*shape, dim), scores.new_full(shape, -torch.inf)
    weights, lse = softmax(scores)
    fetched = torch.zeros(batch, heads, groups, n, positions.shape[-1], dtype=torch.float32, device=scores.device)
    b, h, r, j = (positions >= 0).nonzero(as_tuple=True)
    fetched[b, h, :, r, j] = weights[b, h, :, r, positions[b, h, r, j]]
    weights[b, h, :, r, positions[b, h, r, j]] = 0.0
    out = torch.einsum("bhgnk,bhnkd->bhgnd", fetched, rows[..., dim:].float())
    for i, (copy, length) in enumerate(zip(copies, lengths, strict=True)):
        flat = weights[i].flatten(1, 2)  # [Hkv, G n, S]
        if not length:
            continue
        values = _CODES[copy.code].ValueSum(copy)
        for block, first, count in blocks(copy, length):
            values.add(flat[..., first : first + count], block)
        out[i] += values.result().unflatten(1, (groups, n))
    return out, lse


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Over the last dimension, in place -> (weights, log-sum-exp of the other dimensions)."""
    peak = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (peak + total.log()).squeeze(-1)
    return weights.div_(total.clamp(min=torch.finfo(torch.float32).tiny)), lse


def dequantise(copy: LowBitKV) -> tuple[Tensor, Tensor]:
    """The whole copy as float32 keys and values [Hkv, length, D]. For tests and tools; no step calls it."""
    parts = [_CODES[copy.code].dequantise(block, count, copy) for block, _, count in blocks(copy, copy.length)]
    if not parts:
        empty = torch.empty(copy.num_kv_heads, 0, copy.head_dim, dtype=torch.float32)
        return empty, empty
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)
