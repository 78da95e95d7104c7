"""Exact scores and softmax sums over 16-bit keys and values of one sequence, in float32.

A part is (out [Hq, n, D], lse [Hq, n]) of the attention to some of the tokens, with `out`
normalised within the part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.kernels.types import AttentionParams

Part = tuple[Tensor, Tensor]


def scores(query: Tensor, keys: Tensor, params: AttentionParams) -> Tensor:
    """Return scaled (and capped) scores [Hkv, G, n, T] in float32."""
    heads, _, dim = keys.shape
    grouped = query.float().reshape(heads, -1, dim)  # [Hkv, G n, D]
    product = (grouped @ keys.float().transpose(1, 2)).mul_(params.scaling)  # [Hkv, G n, T]
    if params.softcap is not None:
        product.div_(params.softcap).tanh_().mul_(params.softcap)
    return product.unflatten(1, (-1, query.shape[1]))


def softmax_sum(score: Tensor, values: Tensor) -> Part:
    """Turn scores [Hkv, G, n, T] and values [Hkv, T, D] into a part. Destroys scores.

    A query that sees no key has `out` 0 and `lse` -inf.
    """
    if score.shape[-1] == 0:
        return score.new_zeros(score.shape[0] * score.shape[1], score.shape[2], values.shape[-1]), score.sum(-1).log().flatten(0, 1)
    peak = score.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = score.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    groups, n = score.shape[1], score.shape[2]
    out = (weights.flatten(1, 2) @ values.float()).unflatten(1, (groups, n))  # [Hkv, G, n, D]
    out = out / total.clamp(min=torch.finfo(torch.float32).tiny)
    return out.flatten(0, 1), (peak + total.log()).squeeze(-1).flatten(0, 1)


def add_sinks(lse: Tensor, params: AttentionParams) -> Tensor:
    """Add the sinks' share to lse [B, Hkv, G, n], the log of every query's normaliser."""
    if params.sinks is None:
        return lse
    return torch.logaddexp(lse, params.sinks.float().reshape(1, *lse.shape[1:3], 1))
