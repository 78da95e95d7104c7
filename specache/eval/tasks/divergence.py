"""The Kullback-Leibler divergence between two distributions of the next token."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(expected: Tensor, actual: Tensor, *, rest: float = 0.0) -> float:
    """Return the divergence of `actual` from `expected`, in nats: the sum of p (log p - log q).

    A token that `expected` excludes adds nothing, also where `actual` excludes it too. NaN stays
    NaN, which a run refuses.

    Args:
        expected, actual: log-probabilities [n], -inf where a token is excluded.
        rest: what all other tokens together add.
    """
    terms = torch.where(expected == -torch.inf, 0.0, expected.exp() * (expected - actual))
    return max(float(terms.sum()) + rest, 0.0)  # in this order: max(0.0, nan) is 0.0
