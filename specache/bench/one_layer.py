"""Our attention of one decode step in one layer: score, select, fetch, attend (paper Algorithm 3), over one sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specache.bench.synthetic import fill_compressed
from specache.bench.timing import PhaseClock
from specache.config import Code, SpeCacheConfig
from specache.kernels import dispatch
from specache.layers import CompressedLayer
from specache.prefetch import InPlaceRows
from specache.quant.layout import PageLayout
from specache.quant.pool import ByteBudget, PagePool, PageTable
from specache.tiers.ram import RamTier

RECENT_LSE = math.log(64) + 0.5  # log-sum-exp of normal scores over a residual of 64 tokens


class LowBitLayer:
    """A layer whose tokens are all in the low-bit copy, its 16-bit rows in RAM, read where they lie.

    Args:
        keys, values: [Hkv, S, D], whole groups of tokens.
        top_k: 16-bit pairs per KV head and row.
    """

    def __init__(self, keys: Tensor, values: Tensor, code: Code, bits: int, top_k: int) -> None:
        heads, _, dim = keys.shape
        config = SpeCacheConfig(code=code, bits=bits, top_k=top_k, residual=0)
        layout = PageLayout(code, bits, config.group_size, heads, dim)
        self._tier = RamTier(in_place=True)
        self._table = PageTable(PagePool(layout, keys.device, ByteBudget()))
        self._rows = InPlaceRows(self._tier, 0)
        self._layer = CompressedLayer(0, config, self._table, self._tier, self._rows, keys)
        self._top_k = top_k
        fill_compressed(self._layer, self._tier, keys, values)

    @property
    def nbytes(self) -> int:
        """Bytes of the low-bit copy, which a step reads once."""
        return self._table.nbytes

    def attend(self, query: Tensor, clock: PhaseClock) -> Tensor:
        """Attention of query [1, Hq, n, D] over the copy with the `top_k` pairs swapped in -> float32 [1, Hkv, G, n, D]."""
        copy = self._layer.copy
        lengths, scaling = [copy.length], query.shape[-1] ** -0.5
        clock.begin_step()
        with clock("score"):
            scores = dispatch.score(query, [copy], lengths, scaling, None)  # [1, Hkv, G, n, S]
            rest = scores.new_full(scores.shape[:-1], RECENT_LSE)
        with clock("select"):
            positions = dispatch.select(scores, rest, lengths, self._top_k)  # [1, Hkv, n, k]
        with clock("fetch"):
            rows = torch.stack([self._rows.fetch(wanted)[0] for wanted in positions[0].unbind(1)], dim=1)[None]
        with clock("attend"):
            dispatch.rescore(query, scores, positions, rows, scaling, None)
            out, _ = dispatch.attend(scores, positions, rows, [copy], lengths)
        return out
