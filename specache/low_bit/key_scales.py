"""Key scales of the rotated code (**ours**): factors of key channels before rotation.

Rounding adds the same noise to every channel of a rotated key, and a channel's noise enters the
score in proportion to the query there. So channels with large queries and small keys are enlarged:
`w_c = sqrt(rms(q_c) / rms(k_c))` minimises the error of the score. The scales are computed from the
first `R + g` tokens of a sequence, which stay in the residual until the first group is quantised:
chunking, continuing and sharing a prefix never change them.

The documentation calls them key weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_RMS = 1e-6
LARGEST_RATIO = 100.0  # of a scale to its head's median: later tokens may use what the prefix hardly did


def key_scale_bytes(heads: int, dim: int, observed: int = 0, fixed: bool = True) -> int:
    """Return the bytes of a layer's key scales, once `fixed`, and of `observed` tokens' queries."""
    return heads * dim * torch.float32.itemsize * (fixed + observed)


class KeyScales:
    """The key scales of one layer of one sequence: queries are observed, then the scales are fixed.

    Args:
        tokens: length of the prefix that they are computed from (`R + g`).

    Attributes:
        value: the scales, float32 [Hkv, D], once fixed.
        observed: squared queries of the first m tokens, mean over a KV head's queries, float32
            [Hkv, m, D], as long as they are kept.
    """

    def __init__(self, tokens: int, value: Tensor | None = None, observed: Tensor | None = None) -> None:
        self.tokens = tokens
        self.value = value
        self.observed = observed

    @property
    def observed_tokens(self) -> int:
        """How many queries are kept; 0 again once the pass after the fixing one begins."""
        return 0 if self.observed is None else self.observed.shape[1]

    def observes(self, start: int) -> bool:
        """Return whether `observe` does anything from token `start` on."""
        return start < self.tokens or self.observed is not None

    def observe(self, start: int, query: Tensor, num_kv_heads: int) -> None:
        """Observe the queries [Hq, n, D] of tokens `[start, start + n)`."""
        if start >= self.tokens:
            self.forget_observed()
            return
        squares = query[:, : self.tokens - start].float().square().unflatten(0, (num_kv_heads, -1)).mean(1)  # [Hkv, n, D]
        earlier = squares[:, :0] if self.observed is None else self.observed[:, :start]
        self.observed = torch.cat([earlier, squares], dim=1)

    def forget_observed(self) -> None:
        """Drop the observed queries, once the scales are fixed and the pass is over."""
        self.observed = None

    def fix(self, keys: Tensor) -> Tensor:
        """Return the scales [Hkv, D]; the first call computes them from keys [Hkv, n, D]."""
        if self.value is None:
            self.value = self._from(keys)
        return self.value

    def truncate(self, length: int) -> None:
        """Drop the observed queries from `length` on, and scales that were computed from them."""
        if length < self.tokens and self.observed is not None:
            self.observed = self.observed[:, :length]
            self.value = None

    def survives(self, length: int) -> bool:
        """Return whether a sequence cut to `length` has the scales of a fresh one."""
        return self.value is None or length >= self.tokens or self.observed is not None

    def fork(self, tokens: int) -> KeyScales:
        """Return an independent copy for another `R + g`. Fixed scales stay as they are."""
        return KeyScales(tokens, self.value, self.observed)

    def _from(self, keys: Tensor) -> Tensor:
        keys = keys[:, : self.tokens].float()
        centred = keys - keys.mean(1, keepdim=True)
        key_rms = centred.square().mean(1).sqrt().clamp(min=SMALLEST_RMS)  # [Hkv, D]
        if self.observed is None or not self.observed.shape[1]:
            return torch.ones_like(key_rms)
        query_rms = self.observed.mean(1).sqrt().clamp(min=SMALLEST_RMS)
        scales = (query_rms / key_rms).sqrt()
        scales = scales / scales.median(-1, keepdim=True).values  # only ratios matter
        return scales.clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
