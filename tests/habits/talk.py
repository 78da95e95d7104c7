"""A user of one model with a few conversations and habits in any order, checked against stock.

Each conversation has a text and a SpeCache (its own or a session's). Every pair is fetched (`top_k`
exceeds the text), so that an answer is the stock cache's. A habit may be refused with one of our
errors only where the code here allows it. No other error and no other answer may occur.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import specache
from specache.errors import SpeCacheError
from tests.tiny import prompt

NEW = 3  # tokens per answer
NEAR_TIE = 1e-4  # logits this close may fall either way by rounding
MOST = 3  # most conversations at a time
LONGEST = 420  # most tokens of a text
EVERYTHING = 10**6


class Interrupting:
    """A streamer that ends the answer in the middle, as Ctrl-C or a failing program does."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self._left = after
        self._error = error

    def put(self, tokens: Tensor) -> None:
        if self._left == 0:
            raise self._error("in the middle")
        self._left -= 1

    def end(self) -> None:
        pass


class Talk:
    """One conversation: its cache, and its text so far."""

    def __init__(self, cache: specache.SpeCache, session: specache.Session | None = None, name: str = "") -> None:
        self.cache = cache
        self.session = session
        self.name = name
        self.text = torch.zeros(1, 0, dtype=torch.long)
        self.rounded = False  # True if autocast rounded rows, so that answers may differ

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
        else:
            self.cache.close()


class User:
    """A user's habits. `do(habit, *numbers)` runs one and checks the result.

    Args:
        model: tiny, float32, without an end token.
        settings: settings of the caches; `top_k` is set here.
        folder: folder of sessions and rows on disk.
    """

    def __init__(self, model: Any, settings: dict[str, Any], folder: Path) -> None:
        self.model = model
        self._settings = settings
        self._folder = folder
        self._weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self._merged = False
        self._names = 0
        self.talks: list[Talk] = []
        self.refusals = 0

    def close(self) -> None:
        self._restore_weights()
        for talk in self.talks:
            talk.close()

    # Helpers of the habits

    def _config(self, **changes: Any) -> specache.SpeCacheConfig:
        sizes = {"group_size": 16, "residual": 16, "prefill_chunk": 70, "top_k": EVERYTHING}
        return specache.SpeCacheConfig(**{**sizes, **self._settings, **changes})

    def _talk(self, which: int) -> Talk:
        if not self.talks:
            self.start(0)
        return self.talks[which % len(self.talks)]

    def _add(self, talk: Talk) -> None:
        if len(self.talks) == MOST:
            self.talks.pop(0).close()
        self.talks.append(talk)

    @torch.no_grad()
    def _same(self, text: Tensor, answered: Tensor) -> bool:
        """Return whether `answered` [1, S + n] is stock's answer to `text`, up to a near tie.

        One pass of the stock model without a cache says so: it is, if each token is the likeliest
        one after those before it.
        """
        whole = torch.cat([text, answered[:, text.shape[1] :]], 1)
        logits = self.model(whole, use_cache=False).logits[0, text.shape[1] - 1 : -1]
        for step, token in zip(logits, whole[0, text.shape[1] :].tolist(), strict=True):
            likeliest = step.topk(2)
            if token != likeliest.indices[0]:
                return bool(likeliest.values[0] - likeliest.values[1] < NEAR_TIE)
        return True

    def _generate(self, talk: Talk, ids: Tensor, **more: Any) -> Tensor:
        return specache.generate(self.model, ids, past_key_values=talk.cache, max_new_tokens=NEW, do_sample=False, **more)

    def _ask(self, talk: Talk, text: Tensor, *, may_refuse: bool = False, mode: AbstractContextManager[Any] | None = None) -> None:
        """Ask for the answer to a full text, and check it."""
        try:
            with mode or nullcontext():
                answered = self._generate(talk, text)
        except SpeCacheError:
            if not may_refuse:
                raise
            self.refusals += 1
            return
        assert answered.shape[1] == text.shape[1] + NEW
        assert torch.equal(answered[:, : text.shape[1]], text)
        assert talk.rounded or self._same(text, answered)
        talk.text = answered.clone()

    def _changed_weights(self) -> bool:
        return self._merged

    # Habits. Their numbers are any non-negative integers.

    def start(self, length: int) -> None:
        """Begin a conversation."""
        talk = Talk(specache.SpeCache(self.model, self._config()))
        self._add(talk)
        self._ask(talk, prompt(20 + length % 150, seed=length))

    def start_session(self, length: int) -> None:
        """Begin a conversation in a session on disk."""
        self._names += 1
        name = f"s{self._names}"
        policy = "on-demand" if self._settings["policy"] == "full" else self._settings["policy"]
        config = self._config(slow_tier="auto", policy=policy)  # a session keeps its rows on disk
        session = specache.Session(name, self.model, config, folder=self._folder)
        talk = Talk(session.cache, session, name)
        self._add(talk)
        self._ask(talk, prompt(20 + length % 150, seed=length))

    def go_on(self, which: int, length: int) -> None:
        """Pass the full text so far and new tokens."""
        talk = self._talk(which)
        if talk.text.shape[1] > LONGEST:
            talk.text = talk.text[:, :30]
        text = torch.cat([talk.text, prompt(1 + length % 40, seed=length)], 1)
        self._ask(talk, text, may_refuse=talk.rounded or self._changed_weights())

    def edit(self, which: int, where: int, length: int) -> None:
        """Change a token in the middle of the text, and drop what follows."""
        talk = self._talk(which)
        kept = where % (talk.text.shape[1] + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = torch.cat([talk.text[:, :kept], prompt(1 + length % 30, seed=length)], 1)
            self._ask(talk, text, may_refuse=kept < 2 or talk.rounded or self._changed_weights())

    def ask_again(self, which: int) -> None:
        """Ask for the last answer again."""
        talk = self._talk(which)
        text = talk.text[:, : max(1, talk.text.shape[1] - NEW)]
        self._ask(talk, text, may_refuse=talk.rounded or self._changed_weights())

    def only_what_is_new(self, which: int, length: int, masked: int) -> None:
        """Pass only the new tokens. The mask of the full text says what they continue."""
        talk = self._talk(which)
        new = prompt(1 + length % 20, seed=length)
        full = torch.cat([talk.text, new], 1)
        more = {"attention_mask": torch.ones_like(full)} if masked % 2 else {}
        empty = talk.cache.get_seq_length() == 0  # a session that was closed unsaved: nothing to warn of
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                answered = self._generate(talk, new, **more)
            except SpeCacheError:
                self.refusals += 1
                return
        answer = answered[:, -NEW:]
        begins = torch.equal(talk.text[:, : new.shape[1]][:, :2], new[:, :2])  # the first tokens agree by chance: an edit
        if (warned or begins or empty) and not masked % 2 and self._same(new, torch.cat([new, answer], 1)):
            talk.text = torch.cat([new, answer], 1)  # a new text, with a warning
            return
        talk.text = torch.cat([full, answer], 1)
        assert talk.rounded or self._changed_weights() or self._same(full, talk.text)
        assert not self._changed_weights()

    def fork(self, which: int, deep: int) -> None:
        """Fork a conversation."""
        talk = self._talk(which)
        if talk.session is not None:
            return
        other = Talk(copy.deepcopy(talk.cache) if deep % 2 else talk.cache.fork())
        other.text, other.rounded = talk.text, talk.rounded
        self._add(other)

    def merge_adapter(self, layer: int) -> None:
        """Change weights in place: cached pairs belong to the old ones."""
        with torch.no_grad():
            projections = [m for name, m in self.model.named_modules() if name.endswith("v_proj")]
            projections[layer % len(projections)].weight.add_(0.05)
        self._merged = True
        for talk in self.talks:
            stored = talk.cache.get_seq_length()
            if stored == 0:
                continue
            text = torch.cat([talk.text, prompt(3, seed=layer)], 1)
            try:
                answered = self._generate(talk, text)
            except SpeCacheError:
                self.refusals += 1
                continue
            assert self._same(text, answered), "keys of the old weights were continued"
        fresh = specache.generate(self.model, prompt(40), config=self._config(), max_new_tokens=NEW, do_sample=False)
        assert self._same(prompt(40), fresh)
        self._restore_weights()

    def _restore_weights(self) -> None:
        if self._merged:
            with torch.no_grad():
                for name, tensor in self.model.state_dict().items():
                    tensor.copy_(self._weights[name])
            self._merged = False

    def in_mode(self, which: int, mode: int, length: int) -> None:
        """Make one call in another mode of PyTorch, and the next without it."""
        talk = self._talk(which)
        text = torch.cat([talk.text, prompt(1 + length % 10, seed=length)], 1)
        modes: list[Callable[[], AbstractContextManager[Any]]] = [
            torch.inference_mode,
            torch.enable_grad,
            torch.no_grad,
            lambda: torch.autocast("cpu", dtype=torch.bfloat16),
            lambda: _default_dtype(torch.float64),
            lambda: torch.device("cpu"),
        ]
        chosen = modes[mode % len(modes)]
        if mode % len(modes) == 3:
            talk.rounded = True
        self._ask(talk, text, mode=chosen(), may_refuse=talk.rounded)

    def fail_in_the_middle(self, which: int, after: int, kind: int, length: int) -> None:
        """Have the streamer raise, or Ctrl-C come, during an answer."""
        talk = self._talk(which)
        text = torch.cat([talk.text, prompt(1 + length % 90, seed=length)], 1)
        error = (RuntimeError, KeyboardInterrupt, MemoryError)[kind % 3]
        try:
            self._generate(talk, text, streamer=Interrupting(after % (NEW + 1), error))
        except (error, SpeCacheError):
            return
        talk.text = torch.cat([text, torch.zeros(1, 0, dtype=torch.long)], 1)

    def two_threads(self, which: int, length: int) -> None:
        """Make two calls at once on one cache: each answers correctly or is refused."""
        talk = self._talk(which)
        texts = [torch.cat([talk.text, prompt(1 + (length + i) % 25, seed=length + i)], 1) for i in range(2)]
        outcomes: list[Tensor | BaseException | None] = [None, None]
        start = threading.Barrier(2)

        def run(index: int) -> None:
            try:
                start.wait()
                outcomes[index] = self._generate(talk, texts[index])
            except BaseException as error:
                outcomes[index] = error

        threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a thread hangs"
        for text, outcome in zip(texts, outcomes, strict=True):
            if isinstance(outcome, SpeCacheError):
                self.refusals += 1
            else:
                assert isinstance(outcome, Tensor), outcome
                assert talk.rounded or self._same(text, outcome)
        assert any(isinstance(outcome, Tensor) for outcome in outcomes) or talk.rounded

    def save_and_open(self, which: int, save: int) -> None:
        """Close the session and open it again, saved before or not."""
        talk = self._talk(which)
        if talk.session is None:
            return
        if save % 2:
            talk.session.save()
        talk.session.close()
        talk.session = specache.Session(talk.name, self.model, folder=self._folder)
        talk.cache = talk.session.cache
        if talk.session.saved_tokens == 0:
            talk.rounded = False

    def read_statistics(self, which: int) -> None:
        """Read statistics and lengths, which change nothing."""
        talk = self._talk(which)
        talk.cache.stats()
        assert talk.cache.get_seq_length() <= talk.text.shape[1] + 120

    def sample_several(self, length: int, count: int) -> None:
        """Use `num_return_sequences` over a new text, greedy in effect: all answers are stock's."""
        text = prompt(10 + length % 60, seed=length)
        returned = 1 + count % 3
        options = {"do_sample": True, "top_k": 1, "num_return_sequences": returned, "max_new_tokens": NEW}
        answered = specache.generate(self.model, text, config=self._config(), **options)
        assert answered.shape[0] == returned
        assert all(self._same(text, row[None]) for row in answered)

    def do(self, habit: str, *numbers: int) -> None:
        getattr(self, habit)(*numbers)


class _default_dtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *_: Any) -> None:
        torch.set_default_dtype(self._before)


HABITS = {  # name: number of arguments
    "start": 1,
    "start_session": 1,
    "go_on": 2,
    "edit": 3,
    "ask_again": 1,
    "only_what_is_new": 3,
    "fork": 2,
    "merge_adapter": 1,
    "in_mode": 3,
    "fail_in_the_middle": 4,
    "two_threads": 2,
    "save_and_open": 2,
    "read_statistics": 1,
    "sample_several": 2,
}
