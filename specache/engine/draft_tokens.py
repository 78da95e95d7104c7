"""Which logits processors are applied to a speculative token: those without state and without random numbers.

A guess must never change what is generated. A processor that remembers its calls, or draws, would; it is left out, and the guess is
then only less often right.
"""

from __future__ import annotations

from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

_STATELESS = (
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "MinPLogitsWarper",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
)


class DraftProcessors:
    """The allowed ones of a request's processors, in their order."""

    def __init__(self, processors: LogitsProcessorList) -> None:
        allowed = {getattr(logits_process, name) for name in _STATELESS if hasattr(logits_process, name)}
        self._processors = LogitsProcessorList([p for p in processors if type(p) in allowed])

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Scores [B, V] for tokens that follow input_ids [B, S]."""
        return self._processors(input_ids, logits)
