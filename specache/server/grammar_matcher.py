"""One answer under a grammar: which tokens may follow what it has so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specache.errors import GrammarError
from specache.server.grammar_errors import readable
from specache.templates.final_message import FinalMessage

if TYPE_CHECKING:
    from llguidance import LLMatcher

_FREE_SECONDS = 0.5  # of this thread's time for an answer's grammar, and for each of its tokens
_SECONDS_PER_TOKEN = 0.005
_KEPT_MASKS = 3  # of the newest places: after a token, after the draft token, and before both


class _Mask(NamedTuple):
    """What may follow a text: not these tokens [V], perhaps its end, perhaps its end alone."""

    forbidden: Tensor
    may_end: bool
    is_complete: bool


class _MatcherError(Exception):
    """A matcher reached a limit. It would not go on."""


class GrammarMatcher:
    """Matches one answer against a grammar (`engine/constraints.py`: `TokenConstraint`).

    It follows the answer token by token. Asked about another answer than before it goes back to
    their common prefix, so that a draft token leaves no trace.

    Args:
        new_matcher: returns a matcher at the beginning of the grammar.
        end_of_grammar: the token by which a matcher says that the answer may end here.
        vocabulary: the model's tokens V.
        end_ids: tokens that end the answer where the grammar lets it.
        final: where the grammar begins; `None`: at the first token.
        markers: tokens that may never follow, whatever the grammar says.
    """

    def __init__(
        self,
        new_matcher: Callable[[], LLMatcher],
        end_of_grammar: int,
        vocabulary: int,
        end_ids: Collection[int],
        final: FinalMessage | None = None,
        markers: Collection[int] = (),
    ) -> None:
        self._new_matcher = new_matcher
        self._matcher = new_matcher()
        self._end_of_grammar = end_of_grammar
        self._vocabulary = vocabulary
        self._end_ids = sorted(end_ids)
        self._final = final
        self._markers = list(markers)
        self._spent_s = 0.0
        self._consumed: list[int] = []
        self._masks: dict[int, _Mask] = {}  # by the tokens consumed

    def forbidden(self, answer: Sequence[int]) -> Tensor | None:
        """Return bool [V], True for the tokens that may not follow; `None` behind the answer's end.

        Raises:
            GrammarError: the grammar became too complex, or no token can continue the answer.
        """
        start = 0 if self._final is None else self._final.start(answer)
        if start is None:
            return self._mask_of_reasoning(answer)
        found = self._mask(list(answer[start:]))
        if found is None:
            return None
        forbidden = found.forbidden
        if self._final is not None and not answer:
            forbidden = forbidden.clone()
            forbidden[list(self._final.openings)] = False
        return forbidden

    def is_complete(self, answer: Sequence[int]) -> bool:
        """Return whether the grammar is complete and nothing may follow."""
        start = 0 if self._final is None else self._final.start(answer)
        found = None if start is None else self._mask(list(answer[start:]))
        return found is not None and found.is_complete

    def _mask(self, text: list[int]) -> _Mask | None:
        """Return what may not follow a text.

        Return `None` if it does not match the grammar: the answer's end is in it.
        """
        try:
            return self._mask_behind(text)
        except _MatcherError:  # perhaps because of draft tokens that it has seen
            pass
        try:
            return self._mask_behind(text)
        except _MatcherError as error:
            raise GrammarError(f"The answer's grammar became too complex: {error}. Use a simpler one.") from None

    def _mask_behind(self, text: list[int]) -> _Mask | None:
        same = len(self._consumed)
        while self._consumed[:same] != text[:same]:
            same -= 1
        if same < len(self._consumed):
            self._go_back(same)
        rest = text[same:]
        with self._bounded():
            count = self._matcher.try_consume_tokens(rest) if rest else 0
            self._consumed += rest[:count]  # before the block may raise: the matcher has them
        mask = self._mask_here()
        if count == len(rest):
            return mask
        ends = mask.may_end and rest[count] in self._end_ids
        if not ends and not mask.forbidden[rest[count]]:
            raise self._failed("a token that it allows is too much for it")
        return None

    def _go_back(self, length: int) -> None:
        """Forget what was consumed beyond `length` tokens."""
        with self._bounded():
            self._matcher.rollback(len(self._consumed) - length)
            self._masks = {place: mask for place, mask in self._masks.items() if place <= length}
            del self._consumed[length:]

    def _mask_here(self) -> _Mask:
        """Return what may not follow the tokens consumed."""
        place = len(self._consumed)
        if place not in self._masks:
            with self._bounded():
                bits = self._matcher.compute_bitmask()
                accepts = self._matcher.is_accepting()
            self._masks = {earlier: mask for earlier, mask in self._masks.items() if earlier > place - _KEPT_MASKS}
            self._masks[place] = self._unpacked(bits, accepts)
        return self._masks[place]

    def _unpacked(self, bits: bytes, accepts: bool) -> _Mask:
        """Return the mask of allowed bits."""
        allowed = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")
        may_end = accepts and bool(allowed[self._end_of_grammar])
        allowed[[self._end_of_grammar, *self._markers]] = 0
        forbidden = np.ones(self._vocabulary, dtype=bool)
        common = min(self._vocabulary, len(allowed))
        np.equal(allowed[:common], 0, out=forbidden[:common])
        is_last = bool(forbidden.all())
        if may_end:
            forbidden[self._end_ids] = False
        elif is_last:
            raise GrammarError("The answer's grammar asks for text that this model has no tokens for. Use another grammar.")
        return _Mask(torch.from_numpy(forbidden), may_end, may_end and is_last)

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

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Count the time of a block, and raise an error if its matcher failed."""
        began = time.thread_time()
        yield
        self._spent_s += time.thread_time() - began
        if self._spent_s > _FREE_SECONDS + _SECONDS_PER_TOKEN * len(self._consumed):
            raise GrammarError("The answer's grammar takes too long at each token. Use a simpler one.")
        if self._matcher.is_error():
            raise self._failed(readable(self._matcher.get_error()))

    def _failed(self, reason: str) -> _MatcherError:
        """Begin again with a new matcher, and return the error of the one that cannot go on."""
        self._matcher, self._consumed, self._masks = self._new_matcher(), [], {}
        return _MatcherError(reason)
