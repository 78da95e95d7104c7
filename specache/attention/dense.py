"""Exact attention over 16-bit keys and values, in parts that merge by their log-sum-exp.

Used for prefill, sliding layers, the residual and policy `full`. It handles one sequence at a time:
query [Hq, n, D], keys and values [Hkv, T, D]. A part is (out [Hq, n, D], lse [Hq, n]) in float32,
with `out` normalised within the part.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from specache.kernels.torch.exact import Part, scores, softmax_sum
from specache.kernels.types import AttentionParams
from specache.platform import private_torch
from specache.platform.out_of_memory import is_out_of_memory

QUERY_BLOCK = 512  # queries scored at a time where scores are materialised
KEY_BLOCK = 4096  # keys scored at a time where scores are materialised; rows read at a time from a tier
JOINED_ROWS = 2048  # rows that a CPU reads at a time from main memory: joining their blocks is faster than attending to each

_flash_fails = False  # whether a call of flash attention on CUDA has failed in this process


def attend_part(
    query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams, mask: Tensor | None = None, causal: bool = False
) -> Part:
    """Attend with all queries to one stretch of keys.

    Args:
        mask: bool [n, T], true where a query sees a key; `None` for all of them.
        causal: query `i` sees keys up to the `i`-th (requires `T = n` and no mask).
    """
    if params.softcap is None and query.device.type == "cpu":
        part = _flash_cpu(query, keys, values, params.scaling, mask, causal)
        if part is not None:
            return part
    elif params.softcap is None and mask is None and (part := _flash_cuda(query, keys, values, params.scaling, causal)) is not None:
        return part
    parts = [
        _attend_block(query[:, i : i + QUERY_BLOCK], i, keys, values, params, mask, causal)
        for i in range(0, query.shape[1], QUERY_BLOCK)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def _attend_block(
    query: Tensor, first: int, keys: Tensor, values: Tensor, params: AttentionParams, mask: Tensor | None, causal: bool
) -> Part:
    """Attend with queries `[first, first + n)` to the keys, a block of keys at a time."""
    n, length = query.shape[1], keys.shape[1]
    stop = min(length, first + n) if causal else length

    def parts() -> Iterator[Part]:
        for j in range(0, stop, KEY_BLOCK):
            k, v = keys[:, j : min(j + KEY_BLOCK, stop)], values[:, j : min(j + KEY_BLOCK, stop)]
            seen = None if mask is None else mask[first : first + n, j : j + k.shape[1]]
            if causal:
                own = torch.arange(first, first + n, device=query.device)  # each query's own key
                seen = own[:, None] >= torch.arange(j, j + k.shape[1], device=query.device)
            yield _attend_scores(scores(query, k, params), v, seen)

    return merge_each(parts())


def _attend_scores(score: Tensor, values: Tensor, seen: Tensor | None) -> Part:
    """Mask scores [Hkv, G, n, T], then `softmax_sum` with values [Hkv, T, D]. Destroys scores."""
    if seen is not None:
        score.masked_fill_(~seen, -torch.inf)
    return softmax_sum(score, values)


def _flash_cpu(query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None, causal: bool) -> Part | None:
    """Run PyTorch's fused CPU attention, which reads strided rows in place -> part.

    Returns `None` if this PyTorch has none. The kernel requires contiguous elements in a row and
    does not check it.
    """
    query, keys, values = (_as(query.dtype, x) for x in (query, keys, values))
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)[None, None]
    found = private_torch.flash_attention_cpu(query[None], keys[None], values[None], bias, causal, scaling)
    return None if found is None else (found[0][0].float(), found[1][0].float())


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Return an operand with the query's dtype (autocast may change it) and contiguous elements."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _flash_cuda(query: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool) -> Part | None:
    """Run PyTorch's flash attention on CUDA -> part, or `None` where it is unsupported.

    It does not support float32 and old GPUs, for example.
    """
    global _flash_fails
    query, keys, values = (_as(query.dtype, x)[None] for x in (query, keys, values))
    if _flash_fails or query.shape[-1] % 8 or not _can_flash(query, keys, values, causal):
        return None
    try:
        found = private_torch.flash_attention_cuda(query, keys, values, causal, scaling)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        _flash_fails = True
        reason = str(error).partition("\n")[0]
        message = f"PyTorch's flash attention failed ({reason}). Prompts are read without it, slower."
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None
    return None if found is None else (found[0][0].float(), found[1][0].float())


def _can_flash(query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> bool:
    """Return whether PyTorch would choose flash attention for these operands."""
    grouped = query.shape[1] != keys.shape[1]
    params = torch.backends.cuda.SDPAParams(query, keys, values, None, 0.0, causal, grouped)
    return query.is_cuda and torch.backends.cuda.can_use_flash_attention(params)


def merge(parts: Iterable[Part], sinks: Tensor | None = None) -> Part:
    """Merge parts over disjoint keys, and the sinks, which take probability and have no value."""
    parts = list(parts)
    if sinks is None and len(parts) == 1:
        return parts[0]
    if sinks is None and len(parts) == 2:
        return _merge_pair(*parts[0], *parts[1], into=None)
    lse = torch.stack([part_lse for _, part_lse in parts]).logsumexp(0)  # [Hq, n]
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().unsqueeze(-1))
    weights = [(part_lse - lse).exp().nan_to_num(0.0).unsqueeze(-1) for _, part_lse in parts]
    out = parts[0][0] * weights[0]
    for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
        out += part * weight
    return out, lse


def _merge_pair(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, into: Tensor | None) -> Part:
    """Merge two parts, and write the result to `into` if given, which may be one of them."""
    weight = (lse - other_lse).sigmoid().nan_to_num(0.0)  # NaN where neither part saw a key
    return torch.lerp(other, out, weight.unsqueeze(-1), out=into), torch.logaddexp(lse, other_lse)


def merge_each(parts: Iterable[Part]) -> Part:
    """Merge parts (at least one) as they are computed, so that only two are in memory at a time.

    Their memory is reused.
    """
    total: Part | None = None
    for part in parts:
        total = part if total is None else _merge_pair(*total, *part, into=part[0])
    assert total is not None, "attention over no keys at all"
    return total


def windowed(query: Tensor, keys: Tensor, values: Tensor, window: int, params: AttentionParams) -> Part:
    """Compute a prefill's sliding-window attention, in blocks of queries to avoid an [n, T] mask.

    Query `i` belongs to key `T - n + i` and sees it and the `window - 1` keys before it.
    """
    n, length = query.shape[1], keys.shape[1]
    parts = []
    for i in range(0, n, QUERY_BLOCK):
        block = query[:, i : i + QUERY_BLOCK]
        first = length - n + i  # key of the block's first query
        stop = first + block.shape[1]
        start = max(0, first - window + 1)
        own = torch.arange(first, stop, device=query.device)[:, None]
        key = torch.arange(start, stop, device=query.device)
        seen = (key <= own) & (key > own - window)
        parts.append(attend_part(block, keys[:, start:stop], values[:, start:stop], params, seen))
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)
