"""The text so far: what a call goes on from, decided from what the cache holds.

A call passes the whole text, or only what is new with an `attention_mask` that also covers what came before. The stored tokens are
known, so what does not fit them is refused, and what drops many of them says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence
from specache.errors import UsageError

FIRST_TOKEN = 1  # tokens that two unrelated texts may share: the one that a tokenizer puts in front
FEW_TOKENS = 32  # dropped without a word: about two lines
MANY_TOKENS = 1024  # dropped with a word always; fewer only if they are most of the text

_WHOLE_TEXT = (
    "pass the whole text, torch.cat([what generate returned, new_ids], dim=1): only what is new of it is read. To begin another "
    "text in this cache, call cache.reset() first"
)


def whole_texts(
    cache: SpeCache, new: list[list[int]], columns: int, attention_mask: Tensor | None, width: int | None = None
) -> list[list[int]]:
    """Every sequence of a call from its first token on.

    Args:
        new: what the call passed per sequence, without padding.
        columns: of input_ids, padding counted.
        attention_mask: [B, W], for W = `columns` where the whole text was passed, wider where only what is new was.
        width: W, where the mask is all ones and therefore `None`.

    Raises:
        UsageError: the mask does not fit what is stored, or it is not clear what the call continues.
    """
    if width is None:
        width = columns if attention_mask is None else attention_mask.shape[1]
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
    """Refuse a batch without a mask that has padding where `generate` put it: behind answers that ended before others.

    Args:
        pad: the token that can only be padding, if there is one.

    Raises:
        UsageError: without a mask this would be read as text, which stock generate would not do.
    """
    for index, (sequence, text) in enumerate(zip(_stored(cache, len(texts)), texts, strict=True)):
        if sequence is None or pad is None or shared(sequence, text) < sequence.length:
            continue
        if sequence.pending_token is None and sequence.length <= sequence.prompt_tokens:
            continue  # nothing was generated
        behind = text[sequence.length :]
        if behind[:1] == [sequence.pending_token]:
            behind = behind[1:]
        if behind[:1] == [pad]:
            raise UsageError(
                f"{_which(index, len(texts))}padding (token {pad}) follows the answer, which ended before others of the batch, and "
                "without attention_mask it would be read as text. Pass only what is new as input_ids, with an attention_mask of "
                "the whole text that is 0 at padding."
            )


def begins_alike(cache: SpeCache, texts: list[list[int]]) -> bool:
    """Whether every text begins with something of what the cache holds for it; also where the cache is empty."""
    if len(cache.sequences) != len(texts):
        return not cache.sequences
    pairs = zip(cache.sequences, texts, strict=True)
    return all(sequence.length <= FIRST_TOKEN or shared(sequence, text) > FIRST_TOKEN for sequence, text in pairs)


def warn_of_rereading(cache: SpeCache, texts: list[list[int]]) -> None:
    """Say where prefilling `texts` forgets much of what was read for the cache, and from which token on."""
    for index, (sequence, text) in enumerate(zip(_stored(cache, len(texts)), texts, strict=True)):
        if sequence is None:
            continue
        same = shared(sequence, text)
        if not _is_worth_a_word(sequence, text, same):
            continue
        warnings.warn(
            f"{_which(index, len(texts))}The text differs from what the SpeCache holds from token {same:,} on: of "
            f"{sequence.length:,} stored tokens {sequence.length - same:,} are forgotten, and {len(text) - same:,} are read. If "
            f"only what is new was passed, {_WHOLE_TEXT}.",
            UserWarning,
            stacklevel=2,
        )


def shared_with_loss(cache: SpeCache, text: list[int]) -> int | None:
    """How many tokens a text shares with the only sequence, if what is forgotten for it is worth a word; else `None`."""
    if len(cache.sequences) != 1:
        return None
    same = shared(cache.sequences[0], text)
    return same if _is_worth_a_word(cache.sequences[0], text, same) else None


@contextmanager
def sequence_per_text(cache: SpeCache, count: int, answered: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Give each of `count` texts a sequence of its own, forked where several go on from one (num_return_sequences).

    Where the block fails, there are as many sequences as before, unless the forks have become texts of their own.

    Args:
        answered: whether they have, by tokens that were generated.
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
    """Have each sequence remember the token that was generated last, which nothing followed yet.

    Args:
        texts: what was prefilled.
        new: the tokens that were generated after it; `None` where there were none.
    """
    for sequence, text, generated in zip(sequences, texts, new or [], strict=False):
        behind = len(text) + len(generated) - sequence.length
        sequence.pending_token = generated[-1] if generated and behind == 1 else None


def shared(sequence: Sequence, text: list[int]) -> int:
    """How many tokens a text begins with that the sequence begins with too."""
    pairs = zip(sequence.token_ids, text, strict=False)
    return next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), min(sequence.length, len(text)))


def _stored(cache: SpeCache, count: int) -> list[Sequence] | list[None]:
    """The sequence that each of `count` texts goes on from.

    Raises:
        UsageError: there are more or fewer than texts.
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
    """Whether a text may be only what is new, passed as if it were the whole: unlike what is stored, and short beside it."""
    return _is_unlike(sequence, text) and 2 * len(text) < sequence.length


def _is_unlike(sequence: Sequence, text: list[int]) -> bool:
    """Whether a text begins with nothing of what is stored."""
    same = shared(sequence, text)
    return same <= FIRST_TOKEN and same < min(len(text), sequence.length)


def _is_worth_a_word(sequence: Sequence, text: list[int], same: int) -> bool:
    """Whether it matters that a text shares only the first `same` tokens with what is stored."""
    dropped = sequence.prompt_tokens - same  # generated tokens are dropped by whoever asks again
    if same == len(text) or dropped <= 0:
        return False
    if len(text) < sequence.length and (_is_unlike(sequence, text) or dropped > same):
        return True  # it may be what is new, which begins as a chat template lets every message begin
    return dropped >= MANY_TOKENS or (dropped > FEW_TOKENS and 2 * dropped > sequence.prompt_tokens)


def _continued(
    stored: list[Sequence] | list[None], new: list[list[int]], earlier: list[int], columns: int, width: int
) -> list[list[int]]:
    """What is stored and what is new, where the mask says how many tokens came `earlier` in each row."""
    missing = [count - (0 if sequence is None else sequence.length) for sequence, count in zip(stored, earlier, strict=True)]
    for index, (sequence, count) in enumerate(zip(stored, missing, strict=True)):
        pending = sequence is not None and sequence.pending_token is not None
        if count != 0 and not (count == 1 and pending):
            length = 0 if sequence is None else sequence.length
            held = f"holds {length:,}" + (f", and one that was generated and is not stored yet ({length + 1:,})" if pending else "")
            raise UsageError(
                f"{_which(index, len(new))}attention_mask has {width:,} columns for {columns:,} new ones, so it says that "
                f"{earlier[index]:,} tokens came before; but the SpeCache {held}. Pass a mask with as many ones before the new "
                f"tokens; or {_WHOLE_TEXT}."
            )
    if len(set(missing)) > 1:
        raise UsageError(
            "attention_mask covers the last generated token of some sequences and not of others. Mark in every row the prompt, the "
            f"answer and what is new with 1, and padding with 0; or {_WHOLE_TEXT}."
        )
    texts = []
    for sequence, text, count in zip(stored, new, missing, strict=True):
        if sequence is None:
            texts.append(text)
        else:
            last = [sequence.pending_token] if count and sequence.pending_token is not None else []
            texts.append(sequence.token_ids + last + text)
    return texts


def _which(index: int, count: int) -> str:
    return "" if count == 1 else f"Sequence {index} of the batch: "
