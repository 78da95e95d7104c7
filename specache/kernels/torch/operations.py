"""Plain-PyTorch kernels over packed codes, for every device.

Codes are unpacked a block of pages at a time, never for a whole layer. `kivi` and `rotated` decode
them. Symbols: see `specache.kernels.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specache.config import Code, TopK
from specache.kernels.blocks import blocks, pieces
from specache.kernels.torch import kivi as torch_kivi
from specache.kernels.torch import rotated as torch_rotated
from specache.kernels.types import LowBitKV

CODES: dict[Code, Any] = {Code.KIVI: torch_kivi, Code.ROTATED: torch_rotated}


def quantise(keys: Tensor, values: Tensor, low_bit_kv: LowBitKV, start: int) -> None:
    """Quantise tokens `[start, start + n)` and pack them into the pages of the low-bit copy."""
    done = 0
    for run, offset, count in pieces(low_bit_kv, start, keys.shape[1]):
        CODES[low_bit_kv.code].quantise(keys[:, done : done + count], values[:, done : done + count], run, offset, low_bit_kv)
        done += count


def score(
    query: Tensor,
    low_bit_kvs: Sequence[LowBitKV],
    lengths: Sequence[int],
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Score every low-bit key, without decoding a key."""
    batch, num_heads, n, dim = query.shape
    heads = low_bit_kvs[0].num_kv_heads
    grouped = query.float().reshape(batch, heads, num_heads // heads * n, dim)  # [B, Hkv, G n, D]
    scores = grouped.new_full((*grouped.shape[:3], max(lengths)), -torch.inf)
    for b, (low_bit_kv, length) in enumerate(zip(low_bit_kvs, lengths, strict=True)):
        if not length:
            continue
        scorer = CODES[low_bit_kv.code].QueryScorer(grouped[b], low_bit_kv)
        for block, first, count in blocks(low_bit_kv, length):
            scores[b, :, :, first : first + count] = scorer(block)[..., :count]
    scores.mul_(scaling)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
        for b, length in enumerate(lengths):
            scores[b, :, :, length:] = -torch.inf
    return scores.unflatten(2, (-1, n))  # [B, Hkv, G, n, S]


def rescore(query: Tensor, scores: Tensor, positions: Tensor, kv_rows: Tensor, scaling: float, softcap: float | None) -> None:
    """Replace the low-bit scores of fetched positions by exact ones, in place."""
    exact = exact_scores(query, scores, kv_rows, scaling, softcap)
    b, h, r, j = (positions >= 0).nonzero(as_tuple=True)
    scores[b, h, :, r, positions[b, h, r, j]] = exact[b, h, :, r, j]


def exact_scores(query: Tensor, scores: Tensor, kv_rows: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Return scores [B, Hkv, G, n, k] of keys [B, Hkv, n, k, 2D]; `scores` gives B to n."""
    dim = query.shape[-1]
    grouped = query.float().reshape(*scores.shape[:4], dim)
    keys = kv_rows[..., :dim].float()  # [B, Hkv, n, k, D]
    exact = torch.einsum("bhgnd,bhnkd->bhgnk", grouped, keys) * scaling
    return exact if softcap is None else (exact / softcap).tanh_() * softcap


def select(scores: Tensor, rest_lse: Tensor, lengths: Sequence[int], top_k: TopK) -> Tensor:
    """Select the `k` largest probabilities per KV head and query, averaged over G heads.

    Linear in `S`: all values above the k-th largest, then its equals from the lowest position up.

    Returns:
        int64 [B, Hkv, n, k of the longest sequence], ascending, then -1.
    """
    batch, heads, _, n, size = scores.shape
    k = top_k.of(size)
    if k == 0:
        return torch.empty(batch, heads, n, 0, dtype=torch.long, device=scores.device)
    mean_prob = mean_probabilities(scores, rest_lse)  # [B, Hkv, n, S]
    for b, length in enumerate(lengths):
        mean_prob[b, ..., length:] = -1.0
    positions = largest(mean_prob, k).nonzero()[:, -1].reshape(*mean_prob.shape[:3], k)
    limits = torch.tensor(lengths, device=positions.device).view(-1, 1, 1, 1)
    positions = positions.where(positions < limits, -1)
    for b, length in enumerate(lengths):
        few = top_k.most(length)
        if few < k:  # a shorter sequence selects fewer
            chosen = largest(mean_prob[b], few).nonzero()[:, -1].reshape(*mean_prob.shape[1:3], few)
            positions[b, ..., :few] = chosen.where(chosen < length, -1)
            positions[b, ..., few:] = -1
    return positions


def largest(mean_prob: Tensor, k: int) -> Tensor:
    """Return a bool mask of the `k` largest of the last dimension, of equals the first ones."""
    if k == 0:
        return torch.zeros_like(mean_prob, dtype=torch.bool)
    threshold = mean_prob.topk(k, dim=-1).values[..., -1:]  # the k-th largest
    above = mean_prob > threshold
    level = mean_prob == threshold
    return above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def mean_probabilities(scores: Tensor, rest_lse: Tensor) -> Tensor:
    """Return softmax probabilities averaged over G -> [B, Hkv, n, S].

    It processes one query head of a group at a time, to hold no second copy of the scores.
    """
    groups = scores.shape[2]
    mean_prob = torch.zeros_like(scores[:, :, 0])  # [B, Hkv, n, S]
    for g in range(groups):
        peak = scores[:, :, g].amax(-1, keepdim=True).clamp(min=-1e30)
        weights = (scores[:, :, g] - peak).exp_()
        total = torch.logaddexp(peak + weights.sum(-1, keepdim=True).log(), rest_lse[:, :, g, :, None])
        mean_prob.addcmul_(weights, (peak - total).exp() / groups)
    return mean_prob


def attend(
    scores: Tensor, positions: Tensor, kv_rows: Tensor, low_bit_kvs: Sequence[LowBitKV], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Softmax over the low-bit copy and sum its values; fetched positions use `kv_rows` instead."""
    batch, heads, groups, n, size = scores.shape
    dim = low_bit_kvs[0].head_dim
    if size == 0:
        shape = (batch, heads, groups, n)
        return scores.new_zeros(*shape, dim), scores.new_full(shape, -torch.inf)
    weights, lse = softmax(scores)
    fetched = torch.zeros(batch, heads, groups, n, positions.shape[-1], dtype=torch.float32, device=scores.device)
    b, h, r, j = (positions >= 0).nonzero(as_tuple=True)
    fetched[b, h, :, r, j] = weights[b, h, :, r, positions[b, h, r, j]]
    weights[b, h, :, r, positions[b, h, r, j]] = 0.0
    out = torch.einsum("bhgnk,bhnkd->bhgnd", fetched, kv_rows[..., dim:].float())
    for i, (low_bit_kv, length) in enumerate(zip(low_bit_kvs, lengths, strict=True)):
        flat = weights[i].flatten(1, 2)  # [Hkv, G n, S]
        if not length:
            continue
        values = CODES[low_bit_kv.code].ValueSum(low_bit_kv)
        for block, first, count in blocks(low_bit_kv, length):
            values.add(flat[..., first : first + count], block)
        out[i] += values.result().unflatten(1, (groups, n))
    return out, lse


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the softmax over the last dimension, in place -> (weights, log-sum-exp)."""
    peak = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (peak + total.log()).squeeze(-1)
    return weights.div_(total.clamp(min=torch.finfo(torch.float32).tiny)), lse


def dequantise(low_bit_kv: LowBitKV) -> tuple[Tensor, Tensor]:
    """Return the low-bit copy as float32 keys and values [Hkv, length, D]. For tests and tools."""
    code = CODES[low_bit_kv.code]
    parts = [code.dequantise(block, count, low_bit_kv) for block, _, count in blocks(low_bit_kv, low_bit_kv.length)]
    if not parts:
        empty = torch.empty(low_bit_kv.num_kv_heads, 0, low_bit_kv.head_dim, dtype=torch.float32)
        return empty, empty
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)
