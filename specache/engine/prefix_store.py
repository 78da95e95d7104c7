"""Prompts that were read, kept for those that begin alike.

`PrefixStore` finds the longest stored prefix of a prompt, among finished sequences and among those
that still decode, and hands out a fork of it. Least recently used ones make room for requests.

All methods but `status` run on the thread that steps the engine, between two steps. A running
sequence that is forked must not be attached to a device batch: `take` detaches that of its cache,
and a caller with several caches detaches the others'.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from specache.cache.cache import SpeCache
from specache.cache.prefix_fork import fork_prefix, is_whole, least_tokens, read_tokens, reusable_tokens
from specache.cache.prefixes import PrefixTree, Tokens, tokens_of
from specache.cache.sequence import Sequence
from specache.config import Policy, SpeCacheConfig
from specache.errors import FastMemoryError, SlowTierError
from specache.model.info import inspect_model
from specache.platform import modes
from specache.platform.budget import ByteBudget


@dataclass(eq=False)
class Prefix:
    """A stored text and who holds it.

    Attributes:
        text: token ids, int32 [n], all read from prompts.
        sequence: the finished sequence that the store owns, if any.
        running: sequences of unfinished requests that begin with the text. Others own them.
        used: time of the last use, in seconds since 1970.
        hits: requests that reused it.
    """

    owner: str
    text: Tokens
    sequence: Sequence | None = None
    running: list[Sequence] = field(default_factory=list)
    used: float = 0.0
    hits: int = 0

    @property
    def sequences(self) -> list[Sequence]:
        """Return all sequences that hold the text, the store's own first."""
        return [*([] if self.sequence is None else [self.sequence]), *self.running]


@dataclass
class PrefixCounters:
    """Running totals of a store.

    Attributes:
        hits, misses: prompts that reused a prefix, and that found none.
        cached_tokens: prompt tokens that were not read because they were stored.
        evicted: prefixes that were dropped to make room.
    """

    hits: int = 0
    misses: int = 0
    cached_tokens: int = 0
    evicted: int = 0


@dataclass(frozen=True)
class PrefixStatus:
    """What a store holds now.

    Attributes:
        prefixes: texts stored in memory, not counting those that only running requests hold.
        tokens: tokens of all texts; shared ones count once.
        fast_bytes: fast memory that the stored sequences hold, shared pages once per sequence.
        slow_bytes: bytes of their 16-bit rows.
        oldest_use: time of the least recent use, in seconds since 1970.
    """

    prefixes: int
    tokens: int
    fast_bytes: int
    slow_bytes: int
    oldest_use: float | None
    counters: PrefixCounters


class PrefixStore:
    """Stored prefixes of one model.

    Args:
        model: the model that reads the prompts.
        config: settings of the caches whose sequences are stored; those that the low-bit copy
            depends on must be the same in all of them.
        most_slow_bytes: the most bytes of 16-bit rows in memory that `make_room` allows; None is
            unlimited.
        share_owners: all owners see each other's prefixes.
    """

    def __init__(
        self,
        model: Any,
        config: SpeCacheConfig | None = None,
        *,
        most_slow_bytes: int | None = None,
        share_owners: bool = False,
    ) -> None:
        self._info = inspect_model(model)
        self._config = (config or SpeCacheConfig()).resolved(self._info.device.type)
        self._least = least_tokens(self._config)
        self._most_slow_bytes = most_slow_bytes
        self._share_owners = share_owners
        self._tree: PrefixTree[Prefix] = PrefixTree()
        self._by_use: OrderedDict[Prefix, None] = OrderedDict()  # least recently used first
        self._running: dict[Sequence, Prefix] = {}
        self._counters = PrefixCounters()
        self._budget: ByteBudget | None = None  # of the caches whose sequences are stored

    def match(self, owner: str, token_ids: list[int]) -> int:
        """Return how many tokens of a prompt `take` would reuse. Nothing changes."""
        found = self._best(self._key(owner), tokens_of(token_ids))
        return 0 if found is None else found[2]

    def take(self, owner: str, token_ids: list[int], cache: SpeCache) -> Sequence | None:
        """Return a sequence of `cache` that holds the longest stored prefix of a prompt, or None.

        It shares pages and rows with the stored one. At least one token of the prompt is left to
        run.
        """
        key, text = self._key(owner), tokens_of(token_ids)
        self._budget = cache.resources.budget
        cache.release_device_batch()
        with modes.ours():
            while (found := self._best(key, text)) is not None:
                prefix, source, length = found
                try:
                    fork = fork_prefix(source, cache.context, length)
                except FastMemoryError:
                    if not self._evict_one(sparing=prefix):
                        break
                    continue
                except SlowTierError:
                    fork = None
                if fork is not None:
                    self._touch(prefix)
                    prefix.hits += 1
                    self._counters.hits += 1
                    self._counters.cached_tokens += length
                    return fork
                self._forget_sequence(prefix, source)
        self._counters.misses += 1
        return None

    def add_running(self, owner: str, sequence: Sequence) -> None:
        """Let others fork a sequence whose prompt was read, while its request runs.

        Call `keep` when the request ends.
        """
        for other in [other for other in self._running if not other.length]:  # freed without `keep`
            self._release_running(other)
        self._budget = sequence.budget
        count = read_tokens(sequence)
        if count < self._least or not self._fits_layout(sequence) or sequence in self._running:
            return
        prefix = self._prefix(self._key(owner), tokens_of(sequence.token_ids[:count]))
        prefix.running.append(sequence)
        self._running[sequence] = prefix

    def keep(self, owner: str, sequence: Sequence) -> None:
        """Take over the sequence of a request that ended, however it did.

        Its prompt, as far as it was read, is stored; the answer is cut off. What is not worth
        storing is freed. The caller must not use the sequence any more.
        """
        self._budget = sequence.budget
        with modes.ours():
            self._release_running(sequence)
            try:
                stored = self._store(self._key(owner), sequence)
            except SlowTierError:
                stored = False
            if not stored:
                sequence.clear()

    def drop_running(self, sequence: Sequence) -> None:
        """Forget a running sequence that its owner frees itself."""
        self._release_running(sequence)

    def make_room(self, fast_bytes: int, slow_bytes: int) -> bool:
        """Evict least recently used prefixes until so many bytes are free; return whether they are.

        Bytes that running requests share with a prefix stay in use.
        """
        with modes.ours():
            while not self._has_room(fast_bytes, slow_bytes):
                if not self._evict_one():
                    return False
        return True

    def status(self) -> PrefixStatus:
        """Return what is stored. Any thread may call this."""
        sequences = [prefix.sequence for prefix in list(self._by_use) if prefix.sequence is not None]
        return PrefixStatus(
            prefixes=len(sequences),
            tokens=self._tree.tokens,
            fast_bytes=sum(sequence.held_bytes() for sequence in sequences),
            slow_bytes=sum(sequence.tier.nbytes for sequence in sequences),
            oldest_use=min((prefix.used for prefix in list(self._by_use)), default=None),
            counters=self._counters,
        )

    def close(self) -> None:
        """Free everything."""
        with modes.ours():
            for prefix in list(self._by_use):
                self._drop_sequence(prefix)
        self._running.clear()
        self._by_use.clear()
        self._tree = PrefixTree()

    # Implementation

    def _key(self, owner: str) -> str:
        return "" if self._share_owners else owner

    def _fits_layout(self, sequence: Sequence) -> bool:
        """Return whether a sequence has the low-bit copy that others can share."""
        if self._config.policy is Policy.FULL:
            return not sequence.compressed
        return all(layer.config.layout == self._config.layout for layer in sequence.compressed.values()) and bool(
            sequence.compressed
        )

    def _best(self, key: str, text: Tokens) -> tuple[Prefix, Sequence, int] | None:
        """Return the stored text, its sequence and the tokens that a prompt reuses most of."""
        best: tuple[Prefix, Sequence, int] | None = None
        for matched, prefix in self._tree.candidates(key, text):
            most = best[2] if best else self._least - 1
            if min(matched, len(text) - 1) <= most:
                break
            for sequence in prefix.sequences:
                length = reusable_tokens(sequence, self._info, matched, len(text))
                if length > most:
                    best, most = (prefix, sequence, length), length
        return best

    def _prefix(self, key: str, text: Tokens) -> Prefix:
        """Return the entry of a text, made if there is none, as the one used last."""
        prefix = self._tree.get(key, text)
        if prefix is None:
            prefix = Prefix(key, text)
            self._tree.put(key, text, prefix)
        self._touch(prefix)
        return prefix

    def _touch(self, prefix: Prefix) -> None:
        prefix.used = time.time()
        self._by_use[prefix] = None
        self._by_use.move_to_end(prefix)

    def _store(self, key: str, sequence: Sequence) -> bool:
        """Store a finished sequence unless it adds nothing. Return whether the store holds it."""
        if not self._fits_layout(sequence) or not is_whole(sequence):
            return False
        sequence.truncate(read_tokens(sequence))
        if sequence.length < self._least:
            return False
        text = tokens_of(sequence.token_ids)
        if (other := self._holder(key, text)) is not None:
            self._touch(other)
            return False
        prefix = self._prefix(key, text)
        sequence.set_aside()
        prefix.sequence = sequence
        for _, shorter in self._tree.prefixes(key, text):
            held = shorter.sequence
            if shorter is not prefix and held is not None and self._serves(sequence, len(shorter.text)):
                prefix.hits += shorter.hits
                self._drop_sequence(shorter)
        return True

    def _holder(self, key: str, text: Tokens) -> Prefix | None:
        """Return a stored prefix that serves every prompt that begins with `text`."""
        for matched, prefix in self._tree.candidates(key, text):
            if matched < len(text):
                break
            if prefix.sequence is not None and self._serves(prefix.sequence, matched):
                return prefix
        return None

    def _serves(self, sequence: Sequence, length: int) -> bool:
        """Return whether a stored sequence can be cut to `length` without loss."""
        return reusable_tokens(sequence, self._info, length, length + 1) == length

    def _release_running(self, sequence: Sequence) -> None:
        prefix = self._running.pop(sequence, None)
        if prefix is not None:
            prefix.running = [other for other in prefix.running if other is not sequence]
            self._remove_if_empty(prefix)

    def _forget_sequence(self, prefix: Prefix, sequence: Sequence) -> None:
        """Forget a sequence that cannot be forked."""
        if prefix.sequence is sequence:
            self._drop_sequence(prefix)
        else:
            self._release_running(sequence)

    def _drop_sequence(self, prefix: Prefix) -> None:
        sequence, prefix.sequence = prefix.sequence, None
        if sequence is not None:
            sequence.clear()
        self._remove_if_empty(prefix)

    def _remove_if_empty(self, prefix: Prefix) -> None:
        if not prefix.sequences and prefix in self._by_use:
            del self._by_use[prefix]
            self._tree.remove(prefix.owner, prefix.text)

    def _evict_one(self, sparing: Prefix | None = None) -> bool:
        """Drop the store's least recently used sequence; return whether there was one."""
        for prefix in self._by_use:
            if prefix.sequence is not None and prefix is not sparing:
                self._drop_sequence(prefix)
                self._counters.evicted += 1
                return True
        return False

    def _has_room(self, fast_bytes: int, slow_bytes: int) -> bool:
        left = None if self._budget is None else self._budget.left
        if left is not None and left < fast_bytes:
            return False
        if self._most_slow_bytes is None:
            return True
        stored = [prefix.sequence for prefix in self._by_use if prefix.sequence is not None]
        held = sum(sequence.tier.nbytes for sequence in [*stored, *self._running])
        return held + slow_bytes <= self._most_slow_bytes
