"""Launch the kernels for tokens outside the low-bit copy, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from specache.kernels.triton import launch_options as options
from specache.kernels.triton import recent
from specache.kernels.triton.backend import on_its_device


@on_its_device
def attend_recent(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    residual: Tensor,
    counts: Tensor,
    finite: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append the real token to the residual; attend exactly to the residual and the draft token.

    Args:
        query: [B, Hq, n, D].
        keys, values: [B, Hkv, n, D] of the step's tokens, contiguous in the last dimension.
        residual: [B, 2, Hkv, R + g, D].
        counts: int64 [B], tokens in the residual before.
        finite: bool [], true; set to false if the real token's key or value is not finite.
        scaling, softcap, sinks: see `specache.attention.dense.AttentionParams`.

    Returns:
        (out [B, Hkv, G, n, D], log-sum-exp [B, Hkv, G, n] with sinks, the same without), float32.
    """
    batch, heads, n, dim = keys.shape
    queries = query.shape[1] // heads * n
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    shape = (batch, heads, queries // n, n)
    out = torch.empty(*shape, dim, dtype=torch.float32, device=query.device)
    lse, own_lse = torch.empty(2, *shape, dtype=torch.float32, device=query.device)
    sinks = None if sinks is None else sinks.float().contiguous()
    exact = torch.float32 in (query.dtype, residual.dtype)  # they differ under autocast
    settings = options.recent(dim, queries, n, softcap is not None, sinks is not None, exact)
    recent.recent_kernel[(-(-queries // settings["ROWS_P"]), batch * heads)](
        query.contiguous(),
        keys,
        values,
        residual,
        counts,
        lse if sinks is None else sinks,
        finite.view(torch.uint8),
        out,
        lse,
        own_lse,
        scaling,
        softcap or 0.0,
        residual.shape[3],
        heads,
        *keys.stride()[:3],
        *values.stride()[:3],
        **settings,
    )
    return out, lse, own_lse


@on_its_device
def join(low_bit_out: Tensor, low_bit_lse: Tensor, out: Tensor, lse: Tensor, own_lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Merge low-bit part [B, Hkv, G, n, D] and `attend_recent`'s -> [B, n, Hq, D] in `dtype`."""
    batch, heads, groups, n, dim = low_bit_out.shape
    joined = torch.empty(batch, n, heads * groups, dim, dtype=dtype, device=low_bit_out.device)
    recent.join_kernel[(groups * n, batch * heads)](
        low_bit_out, low_bit_lse, out, lse, own_lse, joined, heads, **options.join(dim, groups * n, n)
    )
    return joined
