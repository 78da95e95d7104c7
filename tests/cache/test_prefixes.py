"""The radix tree finds what a naive list of texts finds."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specache.cache.prefixes import PrefixTree, common_tokens, tokens_of

TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=9)  # few tokens, so that texts share prefixes
OWNER = st.sampled_from(["a", "b", ""])


def shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def runs(tree: PrefixTree[Any]) -> list[Any]:
    """Return every node but the roots."""
    waiting = [child for root in tree._roots.values() for child in root.children.values()]
    for node in waiting:
        waiting += node.children.values()
    return waiting


class TreeAgainstAList(RuleBasedStateMachine):
    """Puts, removals and lookups in any order, beside a dictionary of all texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tree: PrefixTree[object] = PrefixTree()
        self.texts: dict[tuple[str, tuple[int, ...]], object] = {}

    @rule(owner=OWNER, text=TEXT)
    def put(self, owner: str, text: list[int]) -> None:
        value = object()
        self.tree.put(owner, tokens_of(text), value)
        self.texts[owner, tuple(text)] = value

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        owner, text = data.draw(st.sampled_from(sorted(self.texts)))
        self.tree.remove(owner, tokens_of(text))
        del self.texts[owner, text]

    @rule(owner=OWNER, text=TEXT)
    def look_up(self, owner: str, text: list[int]) -> None:
        mine = {other: value for (of, other), value in self.texts.items() if of == owner}
        assert self.tree.get(owner, tokens_of(text)) is mine.get(tuple(text))
        found = list(self.tree.candidates(owner, tokens_of(text)))
        expected = [(shared(list(other), text), value) for other, value in mine.items() if shared(list(other), text)]
        assert sorted(found, key=str) == sorted(expected, key=str)
        lengths = [matched for matched, _ in found]
        assert lengths == sorted(lengths, reverse=True)
        begun = [(len(other), value) for other, value in mine.items() if tuple(text[: len(other)]) == other]
        assert self.tree.prefixes(owner, tokens_of(text)) == sorted(begun, key=lambda pair: -pair[0])

    @rule(owner=OWNER, text=TEXT)
    def remove_what_is_not_there(self, owner: str, text: list[int]) -> None:
        if (owner, tuple(text)) not in self.texts:
            try:
                self.tree.remove(owner, tokens_of(text))
            except KeyError:
                return
            raise AssertionError("it removed nothing and said nothing")

    @invariant()
    def it_is_as_small_as_it_can_be(self) -> None:
        assert len(self.tree) == len(self.texts)
        for node in runs(self.tree):
            assert len(node.run), "an empty run"
            assert node.value is not None or len(node.children) > 1, "a node that separates nothing"
            assert all(child.parent is node and int(child.run[0]) == first for first, child in node.children.items())
        prefixes = {(owner, text[:end]) for owner, text in self.texts for end in range(1, len(text) + 1)}
        assert self.tree.tokens == len(prefixes)


TreeAgainstAList.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_tree_against_a_list = TreeAgainstAList.TestCase


@given(a=TEXT, b=TEXT)
def test_common_tokens_are_counted(a, b):
    assert common_tokens(tokens_of(a), tokens_of(b)) == shared(a, b)


def test_a_hundred_long_documents_take_four_bytes_per_token():
    tree: PrefixTree[int] = PrefixTree()
    chance = np.random.default_rng(0)
    prompt = chance.integers(0, 50_000, 2_000)
    for number in range(100):
        document = np.concatenate([prompt, chance.integers(0, 50_000, 10_000)]).astype(np.int32)
        tree.put("", document, number)
    held = sum(node.run.nbytes + 0 for node in runs(tree))
    assert held == 4 * tree.tokens == 4 * (2_000 + 100 * 10_000)
    assert all(node.run.base is None for node in runs(tree)), "a view keeps the whole text alive"
