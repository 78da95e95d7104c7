"""Ends an answer by its text: at a stop string, or where its format says that it is complete."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from specache.server.answer_parser import AnswerParser


class TextEnds(StoppingCriteria):
    """True for the rows whose text has ended. Runs on the engine's thread, once per step.

    It decodes the text as the stream of the answer does, so both end at the same character.

    Args:
        new_answer: makes an empty answer.
        rows: answers of the request.
        end_ids: tokens that end an answer, and are no part of its text.
    """

    def __init__(self, new_answer: Callable[[], AnswerParser], rows: int, end_ids: Collection[int]) -> None:
        self._texts = [new_answer() for _ in range(rows)]
        self._end_ids = frozenset(end_ids)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Take the newest tokens of input_ids [B, S] and return bool [B]."""
        for text, token in zip(self._texts, input_ids[:, -1].tolist(), strict=True):
            if not text.ended and token not in self._end_ids:
                text.push(token)
        return torch.tensor([text.ended for text in self._texts], device=input_ids.device)
