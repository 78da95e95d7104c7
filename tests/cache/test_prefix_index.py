"""The index finds the longest usable prefix, and knows which was used least recently."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specache.cache.prefix_index import Prefix, PrefixIndex
from specache.cache.prefixes import tokens_of
from specache.config import SpeCacheConfig
from specache.model.info import inspect_model
from tests.tiny import llama

MODEL = llama()
TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=9)
OWNER = st.sampled_from(["a", "b"])


class SavedText:
    """A prefix that goes back only to multiples of a distance, as checkpoints of windows do."""

    def __init__(self, text: list[int], every: int) -> None:
        self.text = tokens_of(text)
        self.every = every
        self.gone = False

    def kept(self, length: int) -> int:
        length = min(length, len(self.text))
        return length if length == len(self.text) else length // self.every * self.every


class IndexAgainstAList(RuleBasedStateMachine):
    """Stores, uses and removals in any order, beside a list in the order of use."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(inspect_model(MODEL), SpeCacheConfig())
        self.index.least = 1
        self.used: list[Prefix] = []

    @rule(owner=OWNER, text=TEXT, every=st.integers(1, 4))
    def store(self, owner: str, text: list[int], every: int) -> None:
        prefix = self.index.entry(owner, tokens_of(text))
        prefix.saved = SavedText(text, every)
        self.used = [*(other for other in self.used if other is not prefix), prefix]

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def use(self, data: Any) -> None:
        prefix = data.draw(st.sampled_from(self.used))
        self.index.touch(prefix)
        self.used = [*(other for other in self.used if other is not prefix), prefix]

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def lose(self, data: Any) -> None:
        prefix = data.draw(st.sampled_from(self.used))
        prefix.saved = None
        self.index.remove_if_empty(prefix)
        self.used.remove(prefix)

    @rule(owner=OWNER, text=TEXT)
    def look_up(self, owner: str, text: list[int]) -> None:
        found = self.index.best(owner, tokens_of(text))
        lengths = [self.usable(prefix, text, len(text) - 1) for prefix in self.used if prefix.owner == owner]
        assert (found[2] if found else 0) == max(lengths, default=0)
        if found:
            assert found[0].owner == owner
            assert self.usable(found[0], text, len(text) - 1) == found[2]
        there = [self.usable(prefix, text, len(text)) for prefix in self.used if prefix.owner == owner]
        assert self.index.saved_tokens(owner, tokens_of(text)) == max(there, default=0)

    @invariant()
    def the_order_is_that_of_use(self) -> None:
        assert list(self.index) == self.used

    @staticmethod
    def usable(prefix: Prefix, text: list[int], most: int) -> int:
        stored = prefix.text.tolist()
        pairs = zip(stored, text, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(stored), len(text)))
        assert prefix.saved is not None
        return prefix.saved.kept(min(same, most))


IndexAgainstAList.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
test_index_against_a_list = IndexAgainstAList.TestCase
