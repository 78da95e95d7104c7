"""OpenAI's penalties for tokens that an answer has already."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


class RepeatPenalties(LogitsProcessor):
    """Lowers the logits of tokens by how often the answer has them: mu - c * frequency - (c > 0) *
    presence.

    Args:
        prompt_length: tokens in front of the answer, which do not count.
        presence, frequency: the penalties of a token that occurs, and of each time it does.
    """

    depends_on_input_ids_only = True  # draft tokens get them too

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._prompt_length = prompt_length
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores [B, V] of the tokens that follow input_ids [B, S]."""
        answer = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)
