"""A radix tree over token ids: which stored texts begin like a new one, and how far.

A node's edge is a run of tokens in one array, so that a text costs four bytes per token and a walk
compares arrays. Every owner has a tree of its own: neither the answer nor the time of a lookup
depends on what others have stored.

The tree knows texts and values. What a value can still be used for is up to the caller, who gets
the candidates in the order of their common prefix (`PrefixTree.candidates`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]  # token ids [n]
_V = TypeVar("_V")


def tokens_of(token_ids: Sequence[int] | NDArray[np.integer]) -> Tokens:
    """Return token ids as an array of their own."""
    return np.array(token_ids, dtype=np.int32)


def common_tokens(a: Tokens, b: Tokens) -> int:
    """Return how many leading tokens two texts share."""
    shorter = min(len(a), len(b))
    differs = a[:shorter] != b[:shorter]
    return int(differs.argmax()) if differs.any() else shorter


class _Node(Generic[_V]):
    """A place in the tree: the run of tokens that leads to it, and the value of the text up to
    it.
    """

    __slots__ = ("children", "parent", "run", "value")

    def __init__(self, run: Tokens, parent: _Node[_V] | None) -> None:
        self.run = run
        self.parent = parent
        self.children: dict[int, _Node[_V]] = {}  # by the first token of their run
        self.value: _V | None = None

    def values(self, without: _Node[_V] | None = None) -> Iterator[_V]:
        """Yield the values of this subtree, nearest first, `without` the subtree of one child."""
        waiting = [self]
        for node in waiting:  # grows while it is walked
            if node.value is not None:
                yield node.value
            waiting += [child for child in node.children.values() if child is not without]


class PrefixTree(Generic[_V]):
    """Values by owner and text, at most one per text. Not safe for several threads."""

    def __init__(self) -> None:
        self._roots: dict[str, _Node[_V]] = {}
        self._count = 0

    def __len__(self) -> int:
        """Return the number of values."""
        return self._count

    @property
    def tokens(self) -> int:
        """Return the tokens in all runs: shared ones count once."""
        waiting, count = list(self._roots.values()), 0
        while waiting:
            node = waiting.pop()
            count += len(node.run)
            waiting += node.children.values()
        return count

    def get(self, owner: str, text: Tokens) -> _V | None:
        """Return the value of exactly this text, or None."""
        path = self._walk(owner, text)
        return path[-1][0].value if path and _ends_at(path, text) else None

    def put(self, owner: str, text: Tokens, value: _V) -> None:
        """Set the value of a text. A run that it leaves in the middle is split."""
        path = self._walk(owner, text)
        if not path:
            path = [(self._roots.setdefault(owner, _Node(text[:0], None)), 0)]
        node, matched = path[-1]
        kept = len(node.run) - (_end(path) - matched)  # tokens of the last node's run that agree
        if kept < len(node.run):
            node = _split(node, kept)
        if matched < len(text):
            leaf = _Node[_V](text[matched:].copy(), node)
            node.children[int(leaf.run[0])] = leaf
            node = leaf
        self._count += node.value is None
        node.value = value

    def remove(self, owner: str, text: Tokens) -> None:
        """Remove the value of a text. Runs that no branch separates any more are joined.

        Raises:
            KeyError: there is none.
        """
        path = self._walk(owner, text)
        if not path or not _ends_at(path, text) or path[-1][0].value is None:
            raise KeyError(f"no value for these {len(text)} tokens")
        node = path[-1][0]
        node.value = None
        self._count -= 1
        parent = node.parent
        if not node.children and parent is not None:
            del parent.children[int(node.run[0])]
            node = parent
        if len(node.children) == 1 and node.value is None and node.parent is not None:
            _join_child(node)
        if not node.children and node.value is None and node.parent is None:
            del self._roots[owner]

    def candidates(self, owner: str, text: Tokens) -> Iterator[tuple[int, _V]]:
        """Yield (tokens shared with `text`, value) of an owner's texts, the most shared first.

        The first costs one walk along `text`. Texts that share nothing are not yielded. The tree
        must not change meanwhile.
        """
        path = self._walk(owner, text)
        below: _Node[_V] | None = None
        for node, matched in reversed(path):
            if matched:
                for value in node.values(without=below):
                    yield matched, value
            below = node

    def prefixes(self, owner: str, text: Tokens) -> list[tuple[int, _V]]:
        """Return (tokens, value) of the owner's texts that `text` begins with, the longest first.

        `text` itself counts.
        """
        path = self._walk(owner, text)
        found, end = [], 0
        for node, matched in path:
            end += len(node.run)
            if node.value is not None and matched == end:
                found.append((matched, node.value))
        return found[::-1]

    def _walk(self, owner: str, text: Tokens) -> list[tuple[_Node[_V], int]]:
        """Return (node, tokens of `text` matched up to and within it) along `text`.

        Of the last node's run only a part may agree.
        """
        node = self._roots.get(owner)
        if node is None:
            return []
        path, matched = [(node, 0)], 0
        while matched < len(text):
            child = node.children.get(int(text[matched]))
            if child is None:
                break
            same = common_tokens(child.run, text[matched:])
            matched += same
            path.append((child, matched))
            if same < len(child.run):
                break
            node = child
        return path


def _end(path: list[tuple[_Node[_V], int]]) -> int:
    """Return the tokens up to the end of a path's last run."""
    return sum(len(node.run) for node, _ in path)


def _ends_at(path: list[tuple[_Node[_V], int]], text: Tokens) -> bool:
    """Return whether a path ends at the end of `text` and of its last run."""
    return path[-1][1] == len(text) == _end(path)


def _split(node: _Node[_V], at: int) -> _Node[_V]:
    """Return a new node in the middle of a node's run, after `at` of its tokens."""
    assert node.parent is not None, "the root's run is empty"
    upper = _Node[_V](node.run[:at].copy(), node.parent)
    node.parent.children[int(upper.run[0])] = upper
    node.run, node.parent = node.run[at:].copy(), upper
    upper.children[int(node.run[0])] = node
    return upper


def _join_child(node: _Node[_V]) -> None:
    """Replace a node without a value by its only child, whose run gets longer."""
    (child,) = node.children.values()
    parent = node.parent
    assert parent is not None, "the root stays"
    child.run, child.parent = np.concatenate([node.run, child.run]), parent
    parent.children[int(child.run[0])] = child
