"""Tokens that an answer may have: a grammar applied to the logits, of real and of draft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria


class TokenConstraint(Protocol):
    """What one answer may contain. Each method is a function of its arguments alone.

    The answers it is asked about in turn mostly share a prefix, since a draft token stands at the
    end of every second one.
    """

    def forbidden(self, answer: Sequence[int]) -> Tensor | None:
        """Return bool [V], True for the tokens that may not follow; `None` if all may."""

    def is_complete(self, answer: Sequence[int]) -> bool:
        """Return whether the answer is complete, and nothing but its end may follow."""


class ConstrainedTokens(LogitsProcessor):
    """Sets the logits of forbidden tokens to -inf.

    Args:
        constraints: one for each of the B rows.
        prompt_length: the tokens in front of each answer.
    """

    depends_on_input_ids_only = True  # draft tokens obey it too (`DraftProcessors`)

    def __init__(self, constraints: Sequence[TokenConstraint], prompt_length: int) -> None:
        self.constraints = list(constraints)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores [B, V] of the tokens that may follow input_ids [B, S]."""
        scores = scores.clone()
        for row, answer in enumerate(input_ids[:, self.prompt_length :].tolist()):
            forbidden = self.constraints[row].forbidden(answer)
            if forbidden is None:
                continue
            forbidden = forbidden.to(scores.device)
            scores[row].masked_fill_(forbidden, -torch.inf)
            if scores[row].amax() == -torch.inf:  # a shortest length forbids the end, and nothing else is left
                scores[row].masked_fill_(~forbidden, 0.0)
        return scores


class ConstraintsComplete(StoppingCriteria):
    """True for the rows whose answer is complete: their end token need not be decoded.

    Args:
        tokens: what the rows are constrained by.
    """

    def __init__(self, tokens: ConstrainedTokens) -> None:
        self._tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return bool [B] for input_ids [B, S]."""
        answers = input_ids[:, self._tokens.prompt_length :].tolist()
        complete = [one.is_complete(answer) for one, answer in zip(self._tokens.constraints, answers, strict=True)]
        return torch.tensor(complete, device=input_ids.device)
