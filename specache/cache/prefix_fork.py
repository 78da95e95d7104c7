"""What another prompt can reuse of a sequence that shares its first tokens, and the fork that does.

Only tokens that were read from a prompt are reused: the rows of generated tokens were computed over
the low-bit copy, and a prompt that goes on from them would get another answer than one that is read
afresh.
"""

from __future__ import annotations

from specache.cache.cache_context import CacheContext
from specache.cache.dense_layer import DenseLayer
from specache.cache.sequence import Sequence
from specache.cache.sizes import on_disk
from specache.config import Policy, SpeCacheConfig
from specache.model.info import ModelInfo
from specache.tiers.disk.disk_tier import DiskTier

LEAST_TOKENS = 64  # tokens below which reusing a prefix is not worth a fork


def least_tokens(config: SpeCacheConfig) -> int:
    """Return the fewest tokens of a prefix that is worth reusing.

    It has at least `R + g` tokens, so that the key scales are computed from nothing else.
    """
    return max(LEAST_TOKENS, config.residual + config.group_size)


def read_tokens(sequence: Sequence) -> int:
    """Return how many of a sequence's first tokens were read from a prompt.

    All of them if it never decoded, also where its prompt was not read to the end.
    """
    return min(sequence.prompt_tokens, sequence.length) if sequence.decode_steps else sequence.length


def is_whole(sequence: Sequence) -> bool:
    """Return whether every layer has all tokens: no pass was interrupted in the middle."""
    return sequence.length > 0 and all(layer.length == sequence.length for layer in sequence.layers.values())


def reusable_tokens(sequence: Sequence, info: ModelInfo, matched: int, total: int) -> int:
    """Return how many stored tokens a prompt of `total` tokens can reuse that shares `matched`.

    At least one token is left to run. A sliding window goes back to a checkpoint. RoPE frequencies
    that depend on the length must be those of both texts.
    """
    kept = sequence.truncated_length(min(matched, read_tokens(sequence), total - 1))
    if kept < 1:
        return 0
    return kept if same_frequencies(info, sequence.length, total, kept) else 0


def same_frequencies(info: ModelInfo, *lengths: int) -> bool:
    """Return whether texts of these lengths have keys of the same RoPE frequencies."""
    return len({info.rope_side(length - 1) for length in lengths}) == 1


def fork_prefix(sequence: Sequence, context: CacheContext, length: int) -> Sequence | None:
    """Return a fork of the first `length` tokens that belongs to the cache of `context`.

    Pages and rows are shared by reference. The fork counts as a text of its own that was read up to
    there. Returns None where the sequence cannot go back to `length` any more.

    Raises:
        FastMemoryError: the budget has no room for the fork's own bytes.
        SlowTierError: rows cannot be read.
    """
    fork = sequence.fork(context)
    try:
        fork.truncate(length)
        if fork.length != length:
            fork.clear()
            return None
        if on_disk(context.config) is not isinstance(fork.tier, DiskTier) and context.config.policy is not Policy.FULL:
            tier = context.new_tier()  # `auto` has chosen another tier since
            fork.copy_rows(tier)
            fork.use_tier(tier)
        for layer in fork.layers.values():
            if isinstance(layer, DenseLayer):
                layer.shrink()  # it is planned with the tokens that it has
    except BaseException:
        fork.clear()
        raise
    begin_anew(fork)
    return fork


def fork_aside(sequence: Sequence, length: int) -> Sequence | None:
    """Return a fork as `fork_prefix` does, of the same cache, that is not meant to decode.

    Returns None too where its windows are not whole.
    """
    fork = fork_prefix(sequence, sequence.context, length)
    if fork is not None and not has_whole_windows(fork):
        fork.clear()
        return None
    if fork is not None:
        fork.set_aside()
    return fork


def has_whole_windows(sequence: Sequence) -> bool:
    """Return whether the sliding windows can also serve one token less, as saved ones must."""
    return all(layer.written == sequence.length for layer in sequence.sliding.values())


def begin_anew(sequence: Sequence) -> None:
    """Forget how the text went on from which a prefix was taken."""
    sequence.prompt_tokens, sequence.pending_token = sequence.length, None
    sequence.decode_steps = sequence.compiled_steps = 0
    sequence.finish_reason = None
