"""Channel weights of the rotated code (**ours**): what every key channel is multiplied by before rotation.

Rounding adds the same noise to every channel of a rotated key, and a query hears it in proportion to its own size there. So
channels with large queries and small keys are enlarged: `w_c = sqrt(rms(q_c) / rms(k_c))` minimises the error of the score. The
weights come from the first `R + g` tokens of a sequence, which are all in the residual until the first group is quantised:
chunking, continuing and sharing a prefix never change them.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_RMS = 1e-6
KEY_WEIGHT_BYTES = 4  # of a channel's weight, float32
LARGEST_RATIO = 100.0  # of a weight to its head's median: a channel that the prefix hardly used may matter later


class KeyWeights:
    """The weights of one layer of one sequence: collected, then fixed.

    Args:
        tokens: length of the prefix they are made from (`R + g`).
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.value: Tensor | None = None  # float32 [Hkv, D] once fixed
        self._squares: Tensor | None = None  # float32 [Hkv, m, D]: squared queries of the first m tokens, mean over a KV head's

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.value, self._squares) if t is not None)

    @property
    def observed_bytes(self) -> int:
        """Bytes of the queries that the weights are made from; gone when the pass after that begins."""
        return 0 if self._squares is None else self._squares.nbytes

    def observe(self, start: int, query: Tensor, num_kv_heads: int) -> None:
        """Take the queries [Hq, n, D] of tokens `[start, start + n)`."""
        if start >= self.tokens:
            self.forget_observed()
            return
        squares = query[:, : self.tokens - start].float().square().unflatten(0, (num_kv_heads, -1)).mean(1)  # [Hkv, n, D]
        earlier = squares[:, :0] if self._squares is None else self._squares[:, :start]
        self._squares = torch.cat([earlier, squares], dim=1)

    def forget_observed(self) -> None:
        """The pass that fixed the weights is over."""
        self._squares = None

    def fix(self, keys: Tensor) -> Tensor:
        """The weights [Hkv, D], made from the sequence's first keys [Hkv, n, D] when first asked for."""
        if self.value is None:
            self.value = self._from(keys)
        return self.value

    def truncate(self, length: int) -> None:
        """Forget queries from `length` on, and weights that were made from them."""
        if length < self.tokens and self._squares is not None:
            self._squares = self._squares[:, :length]
            self.value = None

    def survives(self, length: int) -> bool:
        """Whether a sequence cut to `length` tokens has the weights that a fresh one of this length would get."""
        return self.value is None or length >= self.tokens or self._squares is not None

    @property
    def observed(self) -> Tensor | None:
        """The squared queries float32 [Hkv, m, D] that the weights are made from, as long as they are kept."""
        return self._squares

    @classmethod
    def restored(cls, tokens: int, value: Tensor | None, observed: Tensor | None) -> KeyWeights:
        """The weights of a state that was saved with its `value` and what it had `observed`."""
        weights = cls(tokens)
        weights.value, weights._squares = value, observed
        return weights

    def fork(self, tokens: int) -> KeyWeights:
        """The same for a copy; weights that are fixed stay, also where the copy's `R + g` is another."""
        other = KeyWeights(tokens)
        other.value, other._squares = self.value, self._squares
        return other

    def _from(self, keys: Tensor) -> Tensor:
        keys = keys[:, : self.tokens].float()
        centred = keys - keys.mean(1, keepdim=True)
        key_rms = centred.square().mean(1).sqrt().clamp(min=SMALLEST_RMS)  # [Hkv, D]
        if self._squares is None or not self._squares.shape[1]:
            return torch.ones_like(key_rms)
        query_rms = self._squares.mean(1).sqrt().clamp(min=SMALLEST_RMS)
        weights = (query_rms / key_rms).sqrt()
        weights = weights / weights.median(-1, keepdim=True).values  # only ratios matter
        return weights.clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
