"""Calls that pass only the new tokens of a text: processors, criteria and lengths get all of it.

A repetition penalty, a shortest length or `max_length` counts the text, and not what a call happens
to pass of it. So such a call runs as one that passes the whole text, and its result begins with the
tokens that were passed.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from specache.cache.cache import SpeCache
from specache.engine.continuing import full_texts
from specache.engine.model_arguments import check_position_ids
from specache.engine.request import unpadded_rows

_SEE_THE_TEXT = (MinLengthLogitsProcessor, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor)


def whole_texts(cache: Any, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Any) -> tuple[Tensor, Tensor] | None:
    """Return the whole texts and their mask [B, W], `None` if `input_ids` [B, S] are whole.

    It is also `None` where the rows are fewer than the stored sequences, and while another thread
    uses the cache, which is refused later.

    Raises:
        UsageError: the mask does not fit the stored tokens, or positions are not those of the text.
    """
    if not isinstance(cache, SpeCache) or attention_mask is None or attention_mask.shape[1] <= input_ids.shape[1]:
        return None
    if cache.in_use.elsewhere or not 0 < len(cache.sequences) <= len(input_ids):
        return None
    new = unpadded_rows(input_ids, attention_mask)
    texts = full_texts(cache, new, input_ids.shape[1], attention_mask)
    if position_ids is not None:
        check_position_ids(position_ids, new, texts)
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=input_ids.dtype, device=input_ids.device)
    mask = torch.zeros(len(texts), width, dtype=torch.long, device=input_ids.device)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.tensor(text, dtype=ids.dtype, device=ids.device)
        mask[row, width - len(text) :] = 1
    return ids, mask


def with_passed_tokens(output: Any, passed: Tensor, width: int) -> Any:
    """Return an output of whole texts [B, width + new] with the passed tokens in front of the new.

    Args:
        passed: the call's `input_ids` [b, S], b times the answers to each being B.
    """
    if isinstance(output, GenerateDecoderOnlyOutput):
        output.sequences = with_passed_tokens(output.sequences, passed, width)
        return output
    return torch.cat([one_row_each(passed, len(output)).to(output.dtype), output[:, width:]], dim=1)


def rows_of_answers(cache: Any, input_ids: Tensor, attention_mask: Tensor | None, answers: int) -> tuple[Tensor, Tensor] | None:
    """Return new tokens and mask with a row per answer, where each continues a stored sequence.

    `None` otherwise: stock `generate` repeats the rows.
    """
    if not isinstance(cache, SpeCache) or attention_mask is None or attention_mask.shape[1] <= input_ids.shape[1]:
        return None
    if answers == 1 or len(cache.sequences) != answers * len(input_ids):
        return None
    return one_row_each(input_ids, len(cache.sequences)), one_row_each(attention_mask, len(cache.sequences))


def one_row_each(passed: Tensor, count: int) -> Tensor:
    """Return what was passed [b, S] with every row repeated for its answers -> [count, S]."""
    return passed.repeat_interleave(count // len(passed), dim=0)


def warn_of_unseen_text(processors: Any, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Warn if processors of stock `generate` look at a text of which only a part was passed."""
    if attention_mask is None or attention_mask.dim() != 2 or attention_mask.shape[1] <= input_ids.shape[1]:
        return
    seeing = sorted({type(one).__name__ for one in processors or () if isinstance(one, _SEE_THE_TEXT)})
    if seeing:
        warnings.warn(
            f"{', '.join(seeing)} see only the {input_ids.shape[1]:,} tokens that were passed, and not what the SpeCache holds "
            "before them. Pass the whole text, or call specache.generate, where they see all of it.",
            UserWarning,
            stacklevel=3,
        )
