"""Objects without references are freed at once. The garbage collector is off in these tests."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import specache
from specache.errors import NonFiniteError, SlowTierError, UsageError
from specache.kernels import dispatch
from specache.tiers.disk.disk_tier import DiskTier
from tests.engine.test_model_families import HYBRID, SIZES
from tests.our_threads import our_new_threads
from tests.tiny import FETCHING, llama, prompt, ragged

POLICIES = ["full", *FETCHING, "none"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def hybrid() -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**{**SIZES, **HYBRID, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2})
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Remains:
    """Weak references to all parts of a cache, its memory budget and its folder."""

    def __init__(self, cache: specache.SpeCache, folder: Path | None = None) -> None:
        sequences = cache.sequences
        layers = [layer for sequence in sequences for layer in sequence.layers.values()]
        rows = [layer.row_fetcher for layer in layers if hasattr(layer, "row_fetcher")]
        hot = [one.hot for one in rows if hasattr(one, "hot")]
        self._held = [weakref.ref(one) for one in (cache, cache.context, *sequences, *layers, *rows, *hot)]
        self._tiers = [weakref.ref(sequence.tier) for sequence in sequences]
        self._budget = cache.resources.budget
        self._folder = folder

    def all_freed(self) -> bool:
        """Return whether everything is freed. A read in the background keeps only its tier."""
        assert [type(one()).__name__ for one in self._held if one() is not None] == []
        assert self._budget.used == 0
        return _eventually(lambda: all(tier() is None for tier in self._tiers) and not self._files())

    def _files(self) -> list[str]:
        """Return the names of the files and folders, of which some may be removed meanwhile."""
        if self._folder is None:
            return []
        return [name for _, folders, files in os.walk(self._folder) for name in (*folders, *files)]


def _eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def _tier(kind: str, folder: Path) -> str:
    return f"disk:{folder}" if kind == "disk" else kind


@pytest.mark.parametrize("tier", ["ram", "ram-inplace", "disk"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_dropped_cache_is_freed_at_once(model, tmp_path, policy, tier):
    config = specache.SpeCacheConfig(policy=policy, slow_tier=_tier(tier, tmp_path), residual=16, group_size=16, top_k=8)
    cache = specache.SpeCache(model, config)
    specache.generate(model, prompt(120), past_key_values=cache, **GREEDY)
    remains = Remains(cache, tmp_path)
    del cache
    assert remains.all_freed()
    assert _eventually(lambda: not our_new_threads())


@pytest.mark.parametrize("tier", ["ram", "ram-inplace", "disk"])
def test_a_dropped_batch_and_a_dropped_hybrid_are_freed_at_once(model, hybrid, tmp_path, tier):
    config = specache.SpeCacheConfig(slow_tier=_tier(tier, tmp_path), residual=16, group_size=16, top_k=8)
    for one, (ids, mask) in ((model, ragged(120, 60, 120)), (hybrid, ragged(90, 40))):
        cache = specache.SpeCache(one, config)
        specache.generate(one, ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        remains = Remains(cache, tmp_path)
        del cache
        assert remains.all_freed()


def test_a_dropped_cache_removes_its_files_and_closes_descriptors(model, tmp_path):
    def descriptors() -> int:
        return sum(str(tmp_path) in _file_of(descriptor) for descriptor in os.listdir("/proc/self/fd"))

    cache = specache.SpeCache(model, specache.SpeCacheConfig(slow_tier=f"disk:{tmp_path}"))
    specache.generate(model, prompt(200), past_key_values=cache, **GREEDY)
    assert descriptors() and list(tmp_path.rglob("*.rows"))
    del cache
    assert _eventually(lambda: not descriptors() and not list(tmp_path.iterdir()))


def _file_of(descriptor: str) -> str:
    with suppress(FileNotFoundError):  # it was closed meanwhile
        return os.readlink(f"/proc/self/fd/{descriptor}")
    return ""


@pytest.mark.parametrize("policy", ["verified", "none", "full"])
@pytest.mark.parametrize("original_first", [True, False])
def test_a_cache_and_its_fork_are_freed_independently(model, tmp_path, policy, original_first):
    cache = specache.SpeCache(model, specache.SpeCacheConfig(slow_tier=f"disk:{tmp_path}", residual=16, group_size=16, top_k=8))
    text = specache.generate(model, prompt(120), past_key_values=cache, **GREEDY)
    fork = cache.fork(policy=policy)
    expected = specache.generate(model, torch.cat([text, prompt(4)], 1), past_key_values=fork.fork(), **GREEDY)
    pair = [cache, fork] if original_first else [fork, cache]
    del cache, fork
    gone = weakref.ref(pair[0])
    del pair[0]
    assert gone() is None
    out = specache.generate(model, torch.cat([text, prompt(4)], 1), past_key_values=pair[0], **GREEDY)
    assert torch.equal(out, expected) or not original_first  # the original has another policy
    remains = Remains(pair[0], tmp_path)
    del pair
    assert remains.all_freed()


def test_the_cache_in_a_dropped_output_is_freed(model):
    output = specache.generate(model, prompt(100), return_dict_in_generate=True, **GREEDY)
    remains = Remains(output.past_key_values)
    del output
    assert remains.all_freed()


def test_a_cache_does_not_keep_its_model_alive():
    model = llama()
    cache = specache.SpeCache(model)
    specache.generate(model, prompt(100), past_key_values=cache, **GREEDY)
    gone = weakref.ref(model)
    weights = weakref.ref(model.lm_head.weight)
    del model
    assert gone() is None and weights() is None
    remains = Remains(cache)
    del cache
    assert remains.all_freed()


class Streamer:
    """A streamer that fails at the third call."""

    def __init__(self, error: type[BaseException]) -> None:
        self._error, self._calls = error, 0

    def put(self, tokens: Any) -> None:
        self._calls += 1
        if self._calls == 3:
            raise self._error("streamer")

    def end(self) -> None:
        pass


def _fails(call: Callable[[], Any], error: type[BaseException]) -> None:
    """Check that the call raises, and drop the error."""
    try:
        call()
    except error:
        return
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("tier", ["ram", "ram-inplace", "disk"])
@pytest.mark.parametrize("where", ["streamer", "interrupt", "step", "prefill", "memory"])
def test_after_an_error_a_dropped_cache_is_freed_at_once(model, tmp_path, monkeypatch, where, tier):
    config = specache.SpeCacheConfig(slow_tier=_tier(tier, tmp_path), residual=16, group_size=16, top_k=8, policy="verified")
    cache = specache.SpeCache(model, config)
    error = {"streamer": ValueError, "interrupt": KeyboardInterrupt, "memory": MemoryError}.get(where, NonFiniteError)
    streamer = Streamer(error) if where in ("streamer", "interrupt") else None
    calls = []

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > (1 if where == "prefill" else 6):  # three layers: in the first pass, or in a step
            raise error("quantise")
        quantise(*arguments)

    quantise = dispatch.quantise
    with monkeypatch.context() as patch:
        if streamer is None:
            patch.setattr(dispatch, "quantise", failing)
        options = {"streamer": streamer, "max_new_tokens": 40, "do_sample": False}
        _fails(partial(specache.generate, model, prompt(120), past_key_values=cache, **options), error)
    remains = Remains(cache, tmp_path)
    del cache
    assert remains.all_freed()


@pytest.mark.parametrize("error", [ValueError, MemoryError])
def test_the_internal_cache_of_a_failed_call_is_freed(model, error):
    """Its tensors may live as long as the error, no longer."""

    def caches() -> set[int]:
        return {id(one) for one in gc.get_objects() if isinstance(one, specache.SpeCache)}

    before, during = caches(), set[int]()

    class Looks(Streamer):
        def put(self, value: Any) -> None:
            during.update(caches() - before)
            super().put(value)

    _fails(lambda: specache.generate(model, prompt(120), streamer=Looks(error), **GREEDY), error)
    assert during and not caches() & during


def test_a_closed_or_dropped_session_is_freed_and_unlocked(model, tmp_path):
    for close in (True, False):
        session = specache.Session("one", model, folder=tmp_path)
        specache.generate(model, prompt(120), past_key_values=session.cache, **GREEDY)
        session.save()
        remains = Remains(session.cache)
        if close:
            session.close()
        gone = weakref.ref(session)
        del session
        assert gone() is None and remains.all_freed()
    specache.Session("one", model, folder=tmp_path).close()  # and it is not locked


def test_running_reads_do_not_keep_a_hot_set_alive(model, tmp_path, monkeypatch):
    """A cleared sequence frees its fast memory at once, also while a thread reads for it."""
    reading, go_on = threading.Event(), threading.Event()
    gather = DiskTier.gather

    def slowly(tier: DiskTier, *arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            reading.set()
            go_on.wait(60)
        return gather(tier, *arguments)

    monkeypatch.setattr(DiskTier, "begin", lambda *arguments: None)
    cache = specache.SpeCache(
        model, specache.SpeCacheConfig(slow_tier=f"disk:{tmp_path}", policy="speculative", residual=16, group_size=16, top_k=8)
    )
    monkeypatch.setattr(DiskTier, "gather", slowly)
    try:
        specache.prefill(model, prompt(200), cache=cache)
        layer = cache.sequences[0].compressed[0]
        layer.row_fetcher.submit(torch.tensor([[0, 1, 2], [3, 4, 5]]))
        assert reading.wait(60)
        hot = weakref.ref(layer.row_fetcher.hot)
        del layer
        cache.sequences[0].clear()
        assert hot() is None and cache.resources.budget.used == 0
    finally:
        go_on.set()
    cache.close()


# Copies


@pytest.mark.parametrize("tier", ["ram", "ram-inplace", "disk"])
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_a_copy_of_a_cache_is_a_fork_of_it(model, tmp_path, copied, tier):
    cache = specache.SpeCache(
        model, specache.SpeCacheConfig(slow_tier=_tier(tier, tmp_path), residual=16, group_size=16, top_k=10**6)
    )
    text = specache.generate(model, prompt(200), past_key_values=cache, **GREEDY)
    other = copied(cache)
    for addition in (prompt(5), prompt(7, seed=3)):
        ids = torch.cat([text, addition], 1)
        out = specache.generate(model, ids, past_key_values=other, **GREEDY)
        assert torch.equal(out, model.generate(ids, **GREEDY))
    assert cache.get_seq_length() == text.shape[1] - 1
    ids = torch.cat([text, prompt(9, seed=4)], 1)
    assert torch.equal(specache.generate(model, ids, past_key_values=cache, **GREEDY), model.generate(ids, **GREEDY))


def test_a_deep_copy_of_a_container_copies_each_cache_once(model):
    output = specache.generate(model, prompt(100), return_dict_in_generate=True, **GREEDY)
    cache = output.past_key_values
    copied = copy.deepcopy({"output": output, "caches": [cache, cache]})
    first, second = copied["caches"]
    assert first is second is copied["output"].past_key_values
    assert first is not cache and first.get_seq_length() == cache.get_seq_length() == 105
    specache.generate(model, output.sequences, past_key_values=first, **GREEDY)
    assert (first.get_seq_length(), cache.get_seq_length()) == (111, 105)


def test_a_deep_copy_of_a_sessions_cache_is_independent(model, tmp_path):
    with specache.Session("one", model, folder=tmp_path) as session:
        text = specache.generate(model, prompt(100), past_key_values=session.cache, **GREEDY)
        session.save()
        other = copy.deepcopy(session.cache)
        specache.generate(model, torch.cat([text, prompt(5)], 1), past_key_values=other, **GREEDY)
        assert session.token_ids == text[0, :-1].tolist()
        for copied in (copy.deepcopy, copy.copy):
            with pytest.raises(UsageError, match="fork"):
                copied(session)
        with pytest.raises(UsageError, match="open 'one' again"):
            pickle.dumps(session)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("kind", [specache.Engine, specache.EngineService])
def test_an_engine_cannot_be_copied_and_says_what_to_do(model, copied, kind):
    with (
        kind(model) as one,
        pytest.raises(UsageError, match=rf"{kind.__name__} can be neither .* specache\.{kind.__name__}\(model"),
    ):
        copied(one)


def test_a_closed_service_is_freed_at_once_and_keeps_no_model_alive():
    """Also while the caller keeps tickets of requests that ended, ran, and waited in the queue."""
    model = llama()
    with specache.EngineService(model) as service:
        made = [specache.make_request(model, prompt(50, seed), max_new_tokens=300) for seed in range(3)]
        tickets = [service.submit(specache.Job(request), lambda event: None) for request in made]
        tickets[2].abort()
        tickets[0].wait()
    refs = [weakref.ref(service), weakref.ref(model)]
    del service, model
    assert [ref() for ref in refs] == [None, None]
    assert all(ticket.done for ticket in tickets)
    with pytest.raises(UsageError, match="submitted before"):
        tickets[0].listen()


def test_a_cache_cannot_be_pickled_and_says_what_to_do(model, tmp_path):
    cache = specache.SpeCache(model)
    specache.prefill(model, prompt(80), cache=cache)
    for write in (pickle.dumps, lambda one: torch.save({"cache": one}, tmp_path / "cache.pt")):
        with pytest.raises(UsageError, match=r"specache\.Session.*cache\.fork\(\)"):
            write(cache)


def test_a_failed_fork_leaves_nothing_behind(model, tmp_path, monkeypatch):
    cache = specache.SpeCache(model, specache.SpeCacheConfig(slow_tier=f"disk:{tmp_path}"))
    specache.prefill(model, prompt(200), cache=cache)
    used = cache.resources.budget.used

    def full(*_: Any) -> Any:
        raise SlowTierError("full")

    monkeypatch.setattr(DiskTier, "fork", full)
    _fails(lambda: copy.deepcopy(cache), SlowTierError)
    assert cache.resources.budget.used == used
