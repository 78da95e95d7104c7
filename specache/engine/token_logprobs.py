"""Log-probabilities of tokens: log-softmax of the model's float32 logits, before any processor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specache.engine.events import TokenLogprob

ROWS_AT_ONCE = 16  # rows of logits whose exponentials are held at a time


def token_logprob(token_id: int, logits: Tensor, top: int) -> TokenLogprob:
    """Return the log-probability of a token, and the `top` most likely ones, by logits [V]."""
    return next(_logprobs([token_id], logits[None], top))


def prompt_logprobs(token_ids: list[int], start: int, logits: Tensor, top: int) -> tuple[int, tuple[TokenLogprob, ...]]:
    """Return the first token of a chunk whose log-probability its logits give, and the tokens.

    The first chunk's begin with the prompt's first token, which nothing predicts.

    Args:
        token_ids: the prompt.
        start: the first token of the chunk.
        logits: [n, V] that follow its tokens.
    """
    following = token_ids[start + 1 : start + 1 + logits.shape[0]]  # the prompt's last logits are of the first new token
    found = tuple(_logprobs(following, logits[: len(following)], top))
    return (0, (TokenLogprob(token_ids[0], None), *found)) if start == 0 else (start + 1, found)


def _logprobs(token_ids: list[int], logits: Tensor, top: int) -> Iterator[TokenLogprob]:
    for first in range(0, len(token_ids), ROWS_AT_ONCE):
        ids = torch.tensor(token_ids[first : first + ROWS_AT_ONCE], device=logits.device)
        logprobs = torch.log_softmax(logits[first : first + ROWS_AT_ONCE].float(), dim=-1)
        chosen = logprobs.gather(1, ids[:, None])[:, 0].tolist()
        best = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
        for token, logprob, tokens, values in zip(ids.tolist(), chosen, best.indices.tolist(), best.values.tolist(), strict=True):
            yield TokenLogprob(token, logprob, tuple(zip(tokens, values, strict=True)))
