"""Continuing a cache: which stored tokens a call goes on from.

A call passes the full text, or only the new tokens with an `attention_mask` that also covers the
earlier ones. The stored tokens are known: a text that does not fit them is refused, and one that
drops many of them raises a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence
from specache.errors import UsageError

FIRST_TOKEN = 1  # leading tokens that unrelated texts may share: a tokenizer's BOS token
FEW_TOKENS = 32  # never warn about dropping so few: about two lines
MANY_TOKENS = 1024  # always warn about dropping so many; about fewer only if they are most of the text

_WHOLE_TEXT = (
    "pass the whole text, torch.cat([what generate returned, new_ids], dim=1): only what is new of it is read. To begin another "
    "text in this cache, call cache.reset() first"
)


def full_texts(
    cache: SpeCache, new: list[list[int]], columns: int, attention_mask: Tensor | None, width: int | None = None
) -> list[list[int]]:
    """Return the full texts [B][tokens] of a call, stored tokens included.

    Args:
        new: the call's tokens [B][tokens], without padding.
        columns: S of input_ids [B, S].
        attention_mask: [B, W]. W = S for the full text, W > S if only the new tokens were passed.
        width: W, if the mask is all ones and therefore `None`.

    Raises:
        UsageError: the mask does not fit the stored tokens, or it is unclear what continues them.
    """
    if width is None:
        width = columns if attention_mask is None else attention_mask.shape[1]
    if width < columns:
        raise UsageError(f"attention_mask has {width:,} columns for {columns:,} tokens. Pass one for each.")
    stored = _stored(cache, len(new))
    if width > columns:
        earlier = [width - columns] * len(new)
        if attention_mask is not None:
            earlier = attention_mask[:, : width - columns].sum(dim=1).tolist()
        return _continued(stored, new, earlier, columns, width)
    for index, (sequence, text) in enumerate(zip(stored, new, strict=True)):
        if sequence is not None and _is_unclear(sequence, text):
            raise UsageError(
                f"{_which(index, len(new))}input_ids ({len(text):,} tokens) begin with nothing of the {sequence.length:,} tokens "
                f"that the SpeCache holds, so it is not clear what they continue. To go on from what is stored, {_WHOLE_TEXT}."
            )
    return new


def refuse_padding_behind_answers(cache: SpeCache, texts: list[list[int]], pad: int | None) -> None:
    """Refuse texts without a mask that contain the right padding of `generate`.

    Args:
        pad: the token that can only be padding, or `None`.

    Raises:
        UsageError: the padding would be read as text, unlike in stock generate.
    """
    for index, (sequence, text) in enumerate(zip(_stored(cache, len(texts)), texts, strict=True)):
        if sequence is None or pad is None or common_prefix(sequence, text) < sequence.length:
            continue
        if sequence.pending_token is None and sequence.length <= sequence.prompt_tokens:
            continue  # no token was generated
        following = text[sequence.length :]
        if following[:1] == [sequence.pending_token]:
            following = following[1:]
        if following[:1] == [pad]:
            raise UsageError(
                f"{_which(index, len(texts))}padding (token {pad}) follows the answer, which ended before others of the batch, and "
                "without attention_mask it would be read as text. Pass only what is new as input_ids, with an attention_mask of "
                "the whole text that is 0 at padding."
            )


def begins_alike(cache: SpeCache, texts: list[list[int]]) -> bool:
    """Return whether every text shares a prefix with its stored sequence, if there are any."""
    if len(cache.sequences) != len(texts):
        return not cache.sequences
    pairs = zip(cache.sequences, texts, strict=True)
    return all(sequence.length <= FIRST_TOKEN or common_prefix(sequence, text) > FIRST_TOKEN for sequence, text in pairs)


def warn_of_rereading(cache: SpeCache, texts: list[list[int]]) -> None:
    """Warn if prefilling `texts` drops many stored tokens. Name the first that differs."""
    for index, (sequence, text) in enumerate(zip(_stored(cache, len(texts)), texts, strict=True)):
        if sequence is None:
            continue
        same = common_prefix(sequence, text)
        if not _drops_much(sequence, text, same):
            continue
        warnings.warn(
            f"{_which(index, len(texts))}The text differs from what the SpeCache holds from token {same:,} on: of "
            f"{sequence.length:,} stored tokens {sequence.length - same:,} are forgotten, and {len(text) - same:,} are read. If "
            f"only what is new was passed, {_WHOLE_TEXT}.",
            UserWarning,
            stacklevel=2,
        )


def shared_with_loss(cache: SpeCache, text: list[int]) -> int | None:
    """Return the common prefix with the only sequence if many tokens are dropped, else `None`."""
    if len(cache.sequences) != 1:
        return None
    same = common_prefix(cache.sequences[0], text)
    return same if _drops_much(cache.sequences[0], text, same) else None


@contextmanager
def sequence_per_text(cache: SpeCache, count: int, answered: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Fork the cache's sequences so that each of `count` texts has one (num_return_sequences).

    If the block fails, the forks are removed, unless they already have new tokens.

    Args:
        answered: returns whether they have.
    """
    before = cache.sequences
    repeats = count // len(before) if before else 1
    if repeats > 1:
        cache.release_device_batch()
        forks = [[sequence.fork(cache.context) for _ in range(repeats - 1)] for sequence in before]
        cache.sequences = [s for sequence, more in zip(before, forks, strict=True) for s in (sequence, *more)]
    try:
        yield
    except BaseException:
        if repeats > 1 and not answered():
            cache.release_device_batch()
            given, cache.sequences = cache.sequences, before
            for index, sequence in enumerate(given):
                if index % repeats:
                    sequence.clear()
        raise


def note_pending_tokens(sequences: list[Sequence], texts: list[list[int]], new: list[list[int]] | None) -> None:
    """Set each sequence's `pending_token`: the last new token if it is not stored yet, else `None`.

    Args:
        texts: the prefilled texts.
        new: the tokens generated after them; `None` if there are none.
    """
    for sequence, text, generated in zip(sequences, texts, new or [], strict=False):
        behind = len(text) + len(generated) - sequence.length
        sequence.pending_token = generated[-1] if generated and behind == 1 else None


def common_prefix(sequence: Sequence, text: list[int]) -> int:
    """Return how many leading tokens the sequence and the text share."""
    pairs = zip(sequence.token_ids, text, strict=False)
    return next((i for i, (stored, given) in enumerate(pairs) if stored != given), min(sequence.length, len(text)))


def _stored(cache: SpeCache, count: int) -> list[Sequence] | list[None]:
    """Return the stored sequence that each of `count` texts continues, or `None` for each.

    Raises:
        UsageError: the number of texts is no multiple of the number of sequences.
    """
    held = cache.sequences
    if not held:
        return [None] * count
    if count % len(held):
        raise UsageError(
            f"The SpeCache holds {len(held)} sequences but the batch has {count} prompts. To begin another batch in this cache, "
            "call cache.reset() first."
        )
    return [held[index * len(held) // count] for index in range(count)]


def _is_unclear(sequence: Sequence, text: list[int]) -> bool:
    """Return whether a text may be only the new tokens, without their mask: unrelated and short."""
    return _is_unrelated(sequence, text) and 2 * len(text) < sequence.length


def _is_unrelated(sequence: Sequence, text: list[int]) -> bool:
    """Return whether a text shares no prefix with the stored tokens, a BOS token apart."""
    same = common_prefix(sequence, text)
    return same <= FIRST_TOKEN and same < min(len(text), sequence.length)


def _drops_much(sequence: Sequence, text: list[int], same: int) -> bool:
    """Return whether to warn that a text shares only `same` tokens with the stored ones."""
    if same == len(text):
        return False
    if _is_unrelated(sequence, text):
        return True  # another text, or only what is new: the caller knows which
    dropped = sequence.prompt_tokens - same  # dropping generated tokens is usual: the user asks again
    if dropped <= 0:
        return False
    if len(text) < sequence.length and dropped > same:
        return True  # perhaps only the new message, which shares the chat template's first tokens
    return dropped >= MANY_TOKENS or (dropped > FEW_TOKENS and 2 * dropped > sequence.prompt_tokens)


def _continued(
    stored: list[Sequence] | list[None], new: list[list[int]], earlier: list[int], columns: int, width: int
) -> list[list[int]]:
    """Return stored and new tokens joined. The mask counts `earlier` tokens before each row."""
    unstored = [count - (0 if sequence is None else sequence.length) for sequence, count in zip(stored, earlier, strict=True)]
    for index, (sequence, count) in enumerate(zip(stored, unstored, strict=True)):
        pending = sequence is not None and sequence.pending_token is not None
        if count != 0 and not (count == 1 and pending):
            length = 0 if sequence is None else sequence.length
            held = f"holds {length:,}" + (f", and one that was generated and is not stored yet ({length + 1:,})" if pending else "")
            raise UsageError(
                f"{_which(index, len(new))}attention_mask has {width:,} columns for {columns:,} new ones, so it says that "
                f"{earlier[index]:,} tokens came before; but the SpeCache {held}. Pass a mask with as many ones before the new "
                f"tokens; or {_WHOLE_TEXT}."
            )
    if len(set(unstored)) > 1:
        raise UsageError(
            "attention_mask covers the last generated token of some sequences and not of others. Mark in every row the prompt, the "
            f"answer and what is new with 1, and padding with 0; or {_WHOLE_TEXT}."
        )
    texts = []
    for sequence, text, count in zip(stored, new, unstored, strict=True):
        if sequence is None:
            texts.append(text)
        else:
            last = [sequence.pending_token] if count and sequence.pending_token is not None else []
            texts.append(sequence.token_ids + last + text)
    return texts


def _which(index: int, count: int) -> str:
    return "" if count == 1 else f"Sequence {index} of the batch: "
