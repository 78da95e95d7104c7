"""A decode step's attention in one layer, on PyTorch operations, for every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specache.config import TopK
from specache.kernels.torch import operations
from specache.kernels.torch.exact import add_sinks, scores, softmax_sum
from specache.kernels.types import AttentionParams, LowBitKV, RecentTokens


class TorchLayerStep:
    """`specache.kernels.types.LayerStep` on PyTorch operations.

    Args:
        query: [B, Hq, n, D].
        recent: the newest tokens, per sequence.
        top_k: how many pairs a query selects per KV head.
    """

    def __init__(
        self,
        query: Tensor,
        low_bit_kvs: Sequence[LowBitKV],
        recent: Sequence[RecentTokens],
        top_k: TopK,
        params: AttentionParams,
    ) -> None:
        self._query, self._low_bit_kvs, self._top_k, self._params = query, low_bit_kvs, top_k, params
        self._pending = [tokens.pending for tokens in recent]
        self._attend_recent(recent)
        self._lengths = [low_bit_kv.length for low_bit_kv in low_bit_kvs]
        self._scores = operations.score(query, low_bit_kvs, self._lengths, params.scaling, params.softcap)  # [B, Hkv, G, n, S]
        self._selected: Tensor | None = None
        self._is_exact = False  # whether the scores of fetched keys are exact

    def rescore(self, positions: Tensor, kv_rows: Tensor) -> None:
        operations.rescore(self._query, self._scores, positions, kv_rows, self._params.scaling, self._params.softcap)
        self._is_exact = True

    def select(self) -> Tensor:
        self._selected = operations.select(self._scores, self._rest_lse, self._lengths, self._top_k)
        return self._selected

    def select_next(self) -> Tensor:
        assert self._selected is not None, "select_next before select"
        if not any(self._pending):
            return self._selected[:, :, -1]
        candidates = [length + count for length, count in zip(self._lengths, self._pending, strict=True)]
        extended = self._scores.new_full((*self._scores.shape[:3], 1, max(candidates)), -torch.inf)
        extended[..., : self._scores.shape[-1]] = self._scores[:, :, :, -1:]
        for b, (length, stop) in enumerate(zip(self._lengths, candidates, strict=True)):
            extended[b, ..., length:stop] = self._pending_scores[b]
        return operations.select(extended, self._staying_lse, candidates, self._top_k)[:, :, 0]

    def attend_low_bit(self, positions: Tensor) -> None:
        """Do nothing: `attend_fetched` attends to all pairs at once."""

    def attend_fetched(self, positions: Tensor, kv_rows: Tensor) -> Tensor:
        if not self._is_exact:
            self.rescore(positions, kv_rows)
        out, lse = operations.attend(self._scores, positions, kv_rows, self._low_bit_kvs, self._lengths)
        total = torch.logaddexp(lse, self._rest_lse)
        recent_share = (self._recent_lse - total).exp().unsqueeze(-1)
        out = out * (lse - total).exp().unsqueeze(-1) + self._recent_out * recent_share  # [B, Hkv, G, n, D]
        return out.flatten(1, 2)

    def _attend_recent(self, recent: Sequence[RecentTokens]) -> None:
        """Attend exactly to the recent tokens, and keep the last query's scores of pending ones."""
        n = self._query.shape[2]
        outs, lses, staying, self._pending_scores = [], [], [], []
        for query, tokens in zip(self._query, recent, strict=True):
            score = scores(query, tokens.keys, self._params)  # [Hkv, G, n, r]
            for i in range(n - 1):  # a query does not see the tokens of later ones
                score[:, :, i, score.shape[-1] - (n - 1 - i) :] = -torch.inf
            self._pending_scores.append(score[:, :, -1:, : tokens.pending].clone())
            staying.append(score[:, :, -1:, tokens.pending :].logsumexp(-1))
            groups = score.shape[1]
            out, lse = softmax_sum(score, tokens.values)
            outs.append(out.unflatten(0, (-1, groups)))
            lses.append(lse.unflatten(0, (-1, groups)))
        self._recent_out, self._recent_lse = torch.stack(outs), torch.stack(lses)  # [B, Hkv, G, n, D], [B, Hkv, G, n]
        self._rest_lse = add_sinks(self._recent_lse, self._params)  # everything outside the low-bit copy
        self._staying_lse = add_sinks(torch.stack(staying), self._params)  # [B, Hkv, G, 1] of what stays exact
