"""Stored prefixes by text: in memory, of running requests, and on a disk; and the order of use."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from specache.cache.prefix_fork import least_tokens, reusable_tokens, same_frequencies
from specache.cache.prefixes import PrefixTree, Tokens
from specache.cache.sequence import Sequence
from specache.config import SpeCacheConfig
from specache.model.info import ModelInfo


class Saved(Protocol):
    """A prefix outside of memory.

    Attributes:
        gone: it was removed meanwhile.
    """

    text: Tokens
    gone: bool

    def kept(self, length: int) -> int:
        """Return how many of the first `length` tokens can be brought back."""


@dataclass(eq=False)
class Prefix:
    """A stored text and who holds it.

    Attributes:
        text: token ids, int32 [n], all read from prompts.
        sequence: the finished sequence that the store owns, if any.
        running: sequences of unfinished requests that begin with the text. Others own them.
        saved: the copy outside of memory, if any.
        used: time of the last use, in seconds since 1970.
        hits: requests that reused it.
    """

    owner: str
    text: Tokens
    sequence: Sequence | None = None
    running: list[Sequence] = field(default_factory=list)
    saved: Saved | None = None
    used: float = 0.0
    hits: int = 0

    @property
    def sequences(self) -> list[Sequence]:
        """Return all sequences that hold the text, the store's own first."""
        return [*([] if self.sequence is None else [self.sequence]), *self.running]

    @property
    def is_empty(self) -> bool:
        return self.sequence is None and not self.running and self.saved is None


Source = Sequence | Saved
Found = tuple[Prefix, Source, int]  # a stored text, who holds it, and the tokens that can be reused


class PrefixIndex:
    """Finds what a prompt can reuse. Not safe for several threads.

    Attributes:
        least: the fewest tokens worth reusing.
    """

    def __init__(self, info: ModelInfo, config: SpeCacheConfig) -> None:
        self.least = least_tokens(config)
        self._info = info
        self._tree: PrefixTree[Prefix] = PrefixTree()
        self._by_use: OrderedDict[Prefix, None] = OrderedDict()  # least recently used first
        self._integers: dict[int, int] = {}  # one object per token of the vocabulary
        self.running: dict[Sequence, Prefix] = {}

    def __iter__(self) -> Iterator[Prefix]:
        """Yield all prefixes, the least recently used first. They may change meanwhile."""
        return iter(list(self._by_use))

    def in_memory(self) -> list[Prefix]:
        """Return the prefixes with a sequence that the store owns, least recently used first."""
        return [prefix for prefix in self if prefix.sequence is not None]

    @property
    def tokens(self) -> int:
        """Return the tokens of all texts. Shared ones count once."""
        return self._tree.tokens

    def entry(self, owner: str, text: Tokens, used: float | None = None) -> Prefix:
        """Return the entry of a text, made if there is none, as the one used last.

        Args:
            used: time of its use; None is now.
        """
        prefix = self._tree.get(owner, text)
        if prefix is None:
            prefix = Prefix(owner, text)
            self._tree.put(owner, text, prefix)
        self.touch(prefix, used)
        return prefix

    def touch(self, prefix: Prefix, used: float | None = None) -> None:
        """Count a prefix as used now."""
        prefix.used = time.time() if used is None else used
        self._by_use[prefix] = None
        self._by_use.move_to_end(prefix)

    def best(self, owner: str, text: Tokens, disk: bool = True) -> Found | None:
        """Return what a prompt reuses most tokens of, from memory where nearly as many are there.

        What is on a disk is read in full, which takes longer than a prefill of the few tokens more.
        """
        found = self._longest(owner, text, self.least, saved=False)
        if not disk:
            return found
        more = self._longest(owner, text, self.least if found is None else found[2] + self.least, saved=True)
        return more or found

    def saved_tokens(self, owner: str, text: Tokens) -> int:
        """Return how many tokens of a text could be brought back from the disk."""
        longest = 0
        for matched, prefix in self._tree.candidates(owner, text):
            if matched <= longest:
                break
            if prefix.saved is not None:
                longest = max(longest, self._kept(prefix.saved, matched, len(text) + 1))
        return longest

    def saved_like(self, owner: str, text: Tokens) -> Saved | None:
        """Return the saved prefix that shares most tokens with a text, if it is worth reusing."""
        for matched, prefix in self._tree.candidates(owner, text):
            if matched < self.least:
                break
            if prefix.saved is not None and not prefix.saved.gone:
                return prefix.saved
        return None

    def holder(self, owner: str, text: Tokens) -> Prefix | None:
        """Return a prefix whose own sequence serves every prompt that begins with `text`."""
        for matched, prefix in self._tree.candidates(owner, text):
            if matched < len(text):
                break
            if prefix.sequence is not None and self.serves(prefix.sequence, matched):
                return prefix
        return None

    def shorter(self, prefix: Prefix) -> list[Prefix]:
        """Return the owner's prefixes that a prefix begins with, the longest first."""
        return [other for _, other in self._tree.prefixes(prefix.owner, prefix.text) if other is not prefix]

    def serves(self, source: Source, length: int) -> bool:
        """Return whether all of the first `length` tokens of a source can be reused."""
        return self._usable(source, length, length + 1) == length

    def remove_if_empty(self, prefix: Prefix) -> None:
        """Remove a prefix that nobody holds any more."""
        if prefix.is_empty and prefix in self._by_use:
            del self._by_use[prefix]
            self._tree.remove(prefix.owner, prefix.text)

    def own(self, prefix: Prefix, sequence: Sequence) -> None:
        """Let the store own a sequence that holds a prefix, and no more than that.

        Its list of tokens gets the integers of other lists: each would take 28 bytes.
        """
        sequence.set_aside()
        sequence.token_ids[:] = [self._integers.setdefault(token, token) for token in sequence.token_ids]
        prefix.sequence = sequence

    def add_running(self, prefix: Prefix, sequence: Sequence) -> None:
        prefix.running.append(sequence)
        self.running[sequence] = prefix

    def end_running(self, sequence: Sequence) -> None:
        """Forget a running sequence, if it is known."""
        prefix = self.running.pop(sequence, None)
        if prefix is not None:
            prefix.running = [other for other in prefix.running if other is not sequence]
            self.remove_if_empty(prefix)

    def clear(self) -> None:
        """Forget everything. The caller frees the sequences."""
        self.running.clear()
        self._by_use.clear()
        self._tree = PrefixTree()

    def _longest(self, owner: str, text: Tokens, least: int, saved: bool) -> Found | None:
        """Return the source of at least `least` tokens that a prompt reuses most of.

        Where several are as long, the nearest in the tree is taken.
        """
        best: Found | None = None
        for matched, prefix in self._tree.candidates(owner, text):
            if min(matched, len(text) - 1) < least:
                break
            sources = ([prefix.saved] if prefix.saved is not None else []) if saved else prefix.sequences
            for source in sources:
                length = self._usable(source, matched, len(text))
                if length >= least:
                    best, least = (prefix, source, length), length + 1
        return best

    def _usable(self, source: Source, matched: int, total: int) -> int:
        """Return how many tokens a prompt of `total` that shares `matched` reuses of a source."""
        if isinstance(source, Sequence):
            return reusable_tokens(source, self._info, matched, total)
        return self._kept(source, matched, total)

    def _kept(self, saved: Saved, matched: int, total: int) -> int:
        kept = 0 if saved.gone else saved.kept(min(matched, total - 1))
        return kept if kept and same_frequencies(self._info, len(saved.text), total, kept) else 0
