"""Exact attention over 16-bit keys and values, in parts that merge by their log-sum-exp.

Used for prefill, the sliding layers, the residual and policy `full`. One sequence at a time: query [Hq, n, D], keys and values
[Hkv, T, D]; a part is (out [Hq, n, D], lse [Hq, n]) in float32, `out` normalised within the part.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specache.platform import private_torch
from specache.platform.out_of_memory import is_out_of_memory

QUERY_BLOCK = 512  # rows scored at a time where scores are held
KEY_BLOCK = 4096  # keys scored at a time where scores are held, and rows read back from a slow tier at a time

Part = tuple[Tensor, Tensor]

_flash_fails = False  # in this process, on CUDA: found out at the first call


@dataclass(frozen=True)
class AttentionParams:
    """What a layer's attention needs beside its tensors.

    Attributes:
        scaling: factor of the scores.
        softcap: `c` of `c tanh(score / c)` (Gemma 2), or `None`.
        sinks: one logit per query head that joins the softmax and has no value (GPT-OSS) [Hq], or `None`.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


def attend_part(
    query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams, mask: Tensor | None = None, causal: bool = False
) -> Part:
    """Attention of all rows over one stretch of keys.

    Args:
        mask: bool [n, T], true where a row sees a key; `None` is all of them.
        causal: row `i` sees keys up to the `i`-th (then `T = n` and no mask).
    """
    if params.softcap is None and query.device.type == "cpu":
        part = _flash_cpu(query, keys, values, params.scaling, mask, causal)
        if part is not None:
            return part
    elif params.softcap is None and mask is None and (part := _flash_cuda(query, keys, values, params.scaling, causal)) is not None:
        return part
    parts = [
        _attend_rows(query[:, i : i + QUERY_BLOCK], i, keys, values, params, mask, causal)
        for i in range(0, query.shape[1], QUERY_BLOCK)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def _attend_rows(
    query: Tensor, first: int, keys: Tensor, values: Tensor, params: AttentionParams, mask: Tensor | None, causal: bool
) -> Part:
    """Rows `[first, first + n)` over the keys, a block of keys at a time."""
    n, length = query.shape[1], keys.shape[1]
    stop = min(length, first + n) if causal else length

    def parts() -> Iterator[Part]:
        for j in range(0, stop, KEY_BLOCK):
            k, v = keys[:, j : min(j + KEY_BLOCK, stop)], values[:, j : min(j + KEY_BLOCK, stop)]
            seen = None if mask is None else mask[first : first + n, j : j + k.shape[1]]
            if causal:
                rows = torch.arange(first, first + n, device=query.device)
                seen = rows[:, None] >= torch.arange(j, j + k.shape[1], device=query.device)
            yield _attend_scores(scores(query, k, params), v, seen)

    return merge_each(parts())


def scores(query: Tensor, keys: Tensor, params: AttentionParams) -> Tensor:
    """Scaled (and capped) scores [Hkv, G, n, T] in float32."""
    heads, _, dim = keys.shape
    grouped = query.float().reshape(heads, -1, dim)  # [Hkv, G n, D]
    product = (grouped @ keys.float().transpose(1, 2)).mul_(params.scaling)  # [Hkv, G n, T]
    if params.softcap is not None:
        product.div_(params.softcap).tanh_().mul_(params.softcap)
    return product.unflatten(1, (-1, query.shape[1]))


def _attend_scores(score: Tensor, values: Tensor, seen: Tensor | None) -> Part:
    """Softmax of scores [Hkv, G, n, T] (in place) and the weighted sum of values [Hkv, T, D]."""
    if seen is not None:
        score.masked_fill_(~seen, -torch.inf)
    return softmax_sum(score, values)


def softmax_sum(score: Tensor, values: Tensor) -> Part:
    """Scores [Hkv, G, n, T], destroyed -> part. A row that sees nothing has `out` 0 and `lse` -inf."""
    peak = score.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = score.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    groups, n = score.shape[1], score.shape[2]
    out = (weights.flatten(1, 2) @ values.float()).unflatten(1, (groups, n))  # [Hkv, G, n, D]
    out = out / total.clamp(min=torch.finfo(torch.float32).tiny)
    return out.flatten(0, 1), (peak + total.log()).squeeze(-1).flatten(0, 1)


def _flash_cpu(query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None, causal: bool) -> Part | None:
    """PyTorch's fused CPU attention, which reads strided rows in place and returns its log-sum-exp; `None` if it has none.

    It takes the elements of a row to be neighbours without looking.
    """
    query, keys, values = (_as(query.dtype, x) for x in (query, keys, values))
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)[None, None]
    found = private_torch.flash_attention_cpu(query[None], keys[None], values[None], bias, causal, scaling)
    return None if found is None else (found[0][0].float(), found[1][0].float())


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    """An operand as the fused kernels take it: of the query's dtype, which rows may not have under autocast, and contiguous."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _flash_cuda(query: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool) -> Part | None:
    """PyTorch's flash attention with its log-sum-exp, or `None` where it does not serve: not on CUDA, an old GPU, float32."""
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
    """What PyTorch itself asks before it takes flash attention."""
    grouped = query.shape[1] != keys.shape[1]
    params = torch.backends.cuda.SDPAParams(query, keys, values, None, 0.0, causal, grouped)
    return query.is_cuda and torch.backends.cuda.can_use_flash_attention(params)


def merge(parts: Iterable[Part], sinks: Tensor | None = None) -> Part:
    """Join parts over disjoint keys (and the sinks, which take probability and give no value)."""
    parts = list(parts)
    if sinks is None and len(parts) == 1:
        return parts[0]
    if sinks is None and len(parts) == 2:
        (out, lse), (other, other_lse) = parts
        weight = (lse - other_lse).sigmoid().nan_to_num(0.0)  # neither sees anything: both are 0
        return torch.lerp(other, out, weight.unsqueeze(-1)), torch.logaddexp(lse, other_lse)
    lse = torch.stack([part_lse for _, part_lse in parts]).logsumexp(0)  # [Hq, n]
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().unsqueeze(-1))
    weights = [(part_lse - lse).exp().nan_to_num(0.0).unsqueeze(-1) for _, part_lse in parts]
    out = parts[0][0] * weights[0]
    for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
        out += part * weight
    return out, lse


def merge_each(parts: Iterable[Part]) -> Part:
    """The same as each part comes, so that two are held at a time however many there are (at least one)."""
    total: Part | None = None
    for part in parts:
        total = part if total is None else merge([total, part])
    assert total is not None, "attention over no keys at all"
    return total


def windowed(query: Tensor, keys: Tensor, values: Tensor, window: int, params: AttentionParams) -> Part:
    """Sliding-window prefill: row `i` is the key `T - n + i` and sees it and the `window - 1` before it.

    Rows go in blocks, so that no [n, T] mask is ever made.
    """
    n, length = query.shape[1], keys.shape[1]
    parts = []
    for i in range(0, n, QUERY_BLOCK):
        rows = query[:, i : i + QUERY_BLOCK]
        first = length - n + i  # key of the block's first row
        stop = first + rows.shape[1]
        start = max(0, first - window + 1)
        row = torch.arange(first, stop, device=query.device)[:, None]
        key = torch.arange(start, stop, device=query.device)
        seen = (key <= row) & (key > row - window)
        parts.append(attend_part(rows, keys[:, start:stop], values[:, start:stop], params, seen))
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)
