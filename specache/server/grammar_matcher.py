"""One answer under a grammar: which tokens may follow what it has so far."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from specache.errors import GrammarError
from specache.templates.final_message import FinalMessage

if TYPE_CHECKING:
    from llguidance import LLMatcher

_KEPT_MASKS = 3  # of the newest places: after a token, after the draft token, and before both


class GrammarMatcher:
    """Matches one answer against a grammar (`engine/constraints.py`: `TokenConstraint`).

    It follows the answer token by token. Asked about another answer than before it goes back to
    their common prefix, so that a draft token leaves no trace.

    Args:
        matcher: at the beginning of the grammar; no other answer may share it.
        end_of_grammar: the token by which `matcher` says that the answer may end here.
        vocabulary: the model's tokens V.
        end_ids: tokens that end the answer where the grammar lets it.
        final: where the grammar begins; `None`: at the first token.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        end_of_grammar: int,
        vocabulary: int,
        end_ids: Collection[int],
        final: FinalMessage | None = None,
    ) -> None:
        self._matcher = matcher
        self._end_of_grammar = end_of_grammar
        self._vocabulary = vocabulary
        self._end_ids = sorted(end_ids)
        self._final = final
        self._consumed: list[int] = []
        self._masks: dict[int, tuple[Tensor, bool]] = {}  # tokens consumed -> forbidden, complete

    def forbidden(self, answer: Sequence[int]) -> Tensor | None:
        """Return bool [V], True for the tokens that may not follow; `None` behind the answer's end.

        Raises:
            GrammarError: the grammar became too complex, or no token can continue the answer.
        """
        start = 0 if self._final is None else self._final.start(answer)
        if start is None:
            return self._mask_of_reasoning(answer)
        if not self._follow(answer[start:]):
            return None
        mask, _ = self._mask()
        if self._final is not None and not answer:
            mask = mask.clone()
            mask[list(self._final.openings)] = False
        return mask

    def is_complete(self, answer: Sequence[int]) -> bool:
        """Return whether the grammar is complete and nothing may follow."""
        start = 0 if self._final is None else self._final.start(answer)
        return start is not None and self._follow(answer[start:]) and self._mask()[1]

    def _follow(self, text: Sequence[int]) -> bool:
        """Bring the matcher behind `text`. Return False if it does not match: its end is behind."""
        same = len(self._consumed)
        while self._consumed[:same] != list(text[:same]):
            same -= 1
        if same < len(self._consumed):
            self._matcher.rollback(len(self._consumed) - same)
            self._masks = {length: mask for length, mask in self._masks.items() if length <= same}
            del self._consumed[same:]
        rest = list(text[same:])
        count = self._matcher.try_consume_tokens(rest) if rest else 0
        self._check()
        self._consumed += rest[:count]
        return count == len(rest)

    def _mask(self) -> tuple[Tensor, bool]:
        """Return the tokens [V] that may not follow what was consumed, and whether all is said."""
        place = len(self._consumed)
        if place not in self._masks:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            self._check()
            allowed = np.unpackbits(bits, bitorder="little").astype(bool)
            may_end = bool(allowed[self._end_of_grammar])
            allowed[self._end_of_grammar] = False
            forbidden = np.ones(self._vocabulary, dtype=bool)
            common = min(self._vocabulary, len(allowed))
            forbidden[:common] = ~allowed[:common]
            complete = may_end and bool(forbidden.all())
            if may_end:
                forbidden[self._end_ids] = False
            elif forbidden.all():
                raise GrammarError("No token of this model can continue the answer as its grammar asks. Use another grammar.")
            self._masks = {length: mask for length, mask in self._masks.items() if length > place - _KEPT_MASKS}
            self._masks[place] = torch.from_numpy(forbidden), complete
        return self._masks[place]

    def _mask_of_reasoning(self, answer: Sequence[int]) -> Tensor:
        """Return the tokens [V] that may not follow in reasoning: above all, the answer's end."""
        assert self._final is not None
        only = self._final.allowed(answer)
        if only is None:
            forbidden = torch.zeros(self._vocabulary, dtype=torch.bool)
            forbidden[self._end_ids] = True
        else:
            forbidden = torch.ones(self._vocabulary, dtype=torch.bool)
            forbidden[list(only)] = False
        return forbidden

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"The grammar of this answer became too complex: {first_line(self._matcher.get_error())}.")


def first_line(message: str) -> str:
    """Return what an error of llguidance says, without its state and the request's text."""
    return message.strip().split("\n", 1)[0].strip().rstrip(".")[:300]
