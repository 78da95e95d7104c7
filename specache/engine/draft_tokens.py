"""The logits processors that are applied to a draft token: those without state and random numbers.

A draft token must never change the generated tokens. A processor with state or random numbers
would, so it is left out; draft tokens then only match less often. Of transformers' processors those
without are listed here. Another one says so itself:

    class MyProcessor(LogitsProcessor):
        depends_on_input_ids_only = True  # equal input_ids and scores always give equal scores
"""

from __future__ import annotations

from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from specache.errors import GrammarError

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
    """The stateless processors of a request, in their order."""

    def __init__(self, processors: LogitsProcessorList) -> None:
        allowed = {getattr(logits_process, name) for name in _STATELESS if hasattr(logits_process, name)}
        self._processors = LogitsProcessorList([one for one in processors if type(one) in allowed or _says_so(one)])

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Return the scores [B, V] of the tokens that follow input_ids [B, S]."""
        try:
            return self._processors(input_ids, logits)
        except GrammarError:  # of these tokens, which the answer may never have
            return logits


def _says_so(processor: object) -> bool:
    return getattr(processor, "depends_on_input_ids_only", False) is True
