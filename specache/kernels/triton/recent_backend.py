"""Launches of the kernels for the part of a decode step outside the copy. Nothing here waits for the device."""

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
    """Exact attention of a step's rows over the residual, which row 0 joins, and of the guess over itself.

    Args:
        query: [B, Hq, n, D]; keys, values: [B, Hkv, n, D], a row's elements neighbours.
        residual: [B, 2, Hkv, R + g, D]; counts: int64 [B], tokens in it before.
        finite: bool [], true; false is written if row 0's key or value is not.
        sinks: [Hq], see `specache.attention.dense.AttentionParams`, as for the two before.

    Returns:
        (out [B, Hkv, G, n, D], its log-sum-exp with the sinks [B, Hkv, G, n], without them), float32.
    """
    batch, heads, n, dim = keys.shape
    rows = query.shape[1] // heads * n
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    shape = (batch, heads, rows // n, n)
    out = torch.empty(*shape, dim, device=query.device)
    lse, own_lse = torch.empty(2, *shape, device=query.device)
    sinks = None if sinks is None else sinks.float().contiguous()
    settings = options.recent(dim, rows, n, softcap is not None, sinks is not None, query.dtype == torch.float32)
    recent.recent_kernel[(-(-rows // settings["ROWS_P"]), batch * heads)](
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
def join(copy: Tensor, copy_lse: Tensor, out: Tensor, lse: Tensor, own_lse: Tensor, dtype: torch.dtype) -> Tensor:
    """The copy's part [B, Hkv, G, n, D] and `attend_recent`'s -> [B, n, Hq, D] in the model's dtype."""
    batch, heads, groups, n, dim = copy.shape
    joined = torch.empty(batch, n, heads * groups, dim, dtype=dtype, device=copy.device)
    recent.join_kernel[(groups * n, batch * heads)](
        copy, copy_lse, out, lse, own_lse, joined, heads, **options.join(dim, groups * n, n)
    )
    return joined
