"""Threads and processes: one call at a time uses a cache, any number use a model."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import specache
from specache.cache.one_call import OneCallAtATime
from specache.errors import SpeCacheError, UsageError
from specache.linear import cpu_linear
from specache.model import rope
from specache.tiers.ram import RamTier
from specache.tiers.row_memory import RowBlock, RowMemory
from tests.engine.test_model_families import DYNAMIC, LONGROPE
from tests.tiny import llama, prompt

GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


class Gate:
    """A streamer that blocks its call after the prompt, and then calls `inside`."""

    def __init__(self, inside: Callable[[], Any] = lambda: None) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self._inside = inside
        self._calls = 0

    def put(self, tokens: Any) -> None:
        self._calls += 1
        if self._calls == 3:
            self._inside()
            self.reached.set()
            assert self.go_on.wait(120)

    def end(self) -> None:
        self.reached.set()


class Stopped:
    """A call to generate that is blocked in the middle, on its own thread."""

    def __init__(self, model: Any, cache: specache.SpeCache, ids: torch.Tensor, inside: Callable[[], Any] = lambda: None) -> None:
        self._gate = Gate(inside)
        self._pool = ThreadPoolExecutor(1)
        options = {"past_key_values": cache, "streamer": self._gate, **GREEDY}
        self._call = self._pool.submit(specache.generate, model, ids, **options)

    def __enter__(self) -> None:
        assert self._gate.reached.wait(120)

    def __exit__(self, *_: Any) -> None:
        self._gate.go_on.set()
        self._pool.shutdown()

    def result(self) -> torch.Tensor:
        return self._call.result()


def _cache(model: Any, **changes: Any) -> specache.SpeCache:
    settings = {"residual": 16, "group_size": 16, "top_k": 10**6, **changes}
    return specache.SpeCache(model, specache.SpeCacheConfig(**settings))


CALLS = {
    "generate": lambda model, cache: specache.generate(model, prompt(50, seed=3), past_key_values=cache, **GREEDY),
    "decode": lambda model, cache: model.generate(
        prompt(50, seed=3), custom_generate=specache.decode, past_key_values=cache, **GREEDY
    ),
    "prefill": lambda model, cache: specache.prefill(model, prompt(50, seed=3), cache=cache),
    "fork": lambda model, cache: cache.fork(),
    "close": lambda model, cache: cache.close(),
}


@pytest.mark.parametrize("tier", ["ram", "ram-inplace", "disk"])
@pytest.mark.parametrize("name", CALLS)
def test_a_second_thread_on_a_cache_is_refused_and_the_first_is_unharmed(model, tmp_path, name, tier):
    ids = prompt(100)
    expected = model.generate(ids, **GREEDY)
    cache = _cache(model, slow_tier=f"disk:{tmp_path}" if tier == "disk" else tier)
    first = Stopped(model, cache, ids)
    with first:
        with pytest.raises(UsageError, match=r"in another thread.*one cache per thread.*cache\.fork\(\)"):
            CALLS[name](model, cache)
        assert cache.get_seq_length() == 101 and cache.stats()["slow_bytes"] > 0  # any thread may read statistics
    assert torch.equal(first.result(), expected)
    longer = torch.cat([expected, prompt(5)], 1)
    assert torch.equal(specache.generate(model, longer, past_key_values=cache, **GREEDY), model.generate(longer, **GREEDY))
    cache.reset()
    CALLS[name](model, cache)


def test_bytes_may_be_counted_while_another_thread_adds_a_layer():
    rows = torch.zeros(2, 5, 16), torch.zeros(2, 5, 16)

    class Block(RowBlock):
        """While it is counted, another layer's first rows are added."""

        @property
        def nbytes(self) -> int:
            tier.write(1, 0, *rows)
            return 100

        @nbytes.setter
        def nbytes(self, size: int) -> None:
            pass

    class Memory(RowMemory):
        def take(self, shape: Any, dtype: torch.dtype) -> RowBlock:
            return Block(self, torch.empty(shape, dtype=dtype))

    tier = RamTier(in_place=True, memory=Memory())
    for layer in (0, 2):
        tier.write(layer, 0, *rows)
    assert [tier.nbytes, tier.nbytes] == [200, 300]


def test_the_streamer_of_a_refused_call_is_ended(model):
    cache, ended = _cache(model), threading.Event()

    class Ends(Gate):
        def end(self) -> None:
            ended.set()

    with Stopped(model, cache, prompt(60)), pytest.raises(UsageError):
        specache.generate(model, prompt(60), past_key_values=cache, streamer=Ends(), **GREEDY)
    assert ended.is_set()


@pytest.mark.parametrize("call", ["save", "cut", "fork", "close"])
def test_a_session_in_use_refuses_other_calls_without_harm(model, tmp_path, call):
    calls = {"save": (), "cut": (10,), "fork": ("two",), "close": ()}
    ids = prompt(100)
    session = specache.Session("one", model, folder=tmp_path)
    specache.generate(model, prompt(80, seed=5), past_key_values=session.cache, **GREEDY)
    session.save()
    first = Stopped(model, session.cache, ids)
    with first, pytest.raises(UsageError, match=f"Session.{call} was called while generate is using"):
        getattr(session, call)(*calls[call])
    assert torch.equal(first.result(), model.generate(ids, **GREEDY))
    session.save()
    session.close()
    with specache.Session("one", model, folder=tmp_path) as again:
        assert again.token_ids == first.result()[0, :-1].tolist()


def test_a_streamer_may_save_its_session_during_the_call(model, tmp_path):
    """The commands save after the prefill: a crash during the answer must not cost the document."""
    ids, saved = prompt(100), []
    expected = model.generate(ids, **GREEDY)

    class Saves:
        def put(self, tokens: Any) -> None:
            if session.cache.get_seq_length():
                session.save()
                saved.append(session.saved_tokens)

        def end(self) -> None: ...

    session = specache.Session("one", model, folder=tmp_path)
    assert torch.equal(specache.generate(model, ids, past_key_values=session.cache, streamer=Saves(), **GREEDY), expected)
    assert saved == list(range(100, 110))
    session.close()  # does not save
    with specache.Session("one", model, folder=tmp_path) as again:
        assert again.token_ids == expected[0, :-1].tolist()
        longer = torch.cat([expected, prompt(5)], 1)
        out = specache.generate(model, longer, past_key_values=again.cache, **GREEDY)
        assert torch.equal(out, model.generate(longer, **GREEDY))


@pytest.mark.parametrize("name", CALLS)
def test_a_callback_cannot_use_the_cache_of_its_own_call(model, name):
    """It may read statistics, and use another cache, also a new one."""
    ids, cache, seen = prompt(100), _cache(model), []

    def inside() -> None:
        with pytest.raises(UsageError, match=f"{'generate' if name == 'decode' else name} was called while generate is using"):
            CALLS[name](model, cache)
        seen.append(cache.stats()["slow_bytes"])
        seen.append(specache.generate(model, ids, config=cache.config, **GREEDY))

    first = Stopped(model, cache, ids, inside)
    with first:
        pass
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(first.result(), expected)
    assert torch.equal(seen[1], expected) and seen[0] > 0


def test_two_calls_on_one_cache_answer_correctly_or_are_refused(model):
    prompts = [prompt(150), prompt(140, seed=5)]
    expected = [model.generate(ids, **GREEDY) for ids in prompts]
    cache = _cache(model)
    outcomes: list[str] = []

    def ask(index: int) -> None:
        for _ in range(4):
            try:
                out = specache.generate(model, prompts[index], past_key_values=cache, **GREEDY)
                outcomes.append("right" if torch.equal(out, expected[index]) else "wrong")
            except SpeCacheError:
                outcomes.append("refused")

    _together(ask, 2)
    assert len(outcomes) == 8 and "wrong" not in outcomes and "right" in outcomes
    assert torch.equal(specache.generate(model, prompts[0], past_key_values=cache, **GREEDY), expected[0])


def _together(call: Callable[[int], None], count: int) -> None:
    """Run call(0) to call(count - 1), each on its own thread, and raise their errors."""
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(call, index) for index in range(count)]:
            future.result()


POLICIES = ["full", "verified", "speculative", "previous", "on-demand"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_threads_may_run_one_model_at_once_each_with_its_own_cache(tmp_path, attention):
    """One thread runs stock generate, whose attention and masks pass through ours."""
    model = llama(attn_implementation=attention)
    prompts = [prompt(70 + 9 * index, seed=index) for index in range(len(POLICIES) + 1)]
    expected = [model.generate(ids, **GREEDY) for ids in prompts]
    wrong = []

    def ask(index: int) -> None:
        for turn in range(3):
            if index == len(POLICIES):
                out = model.generate(prompts[index], **GREEDY)
            else:
                tier = ["ram", "ram-inplace", f"disk:{tmp_path}"][(index + turn) % 3]
                config = specache.SpeCacheConfig(policy=POLICIES[index], slow_tier=tier, top_k=10**6, residual=16, group_size=16)
                out = specache.generate(model, prompts[index], config=config, **GREEDY)
            if not torch.equal(out, expected[index]):
                wrong.append(index)

    if attention == "eager":
        expected[0] = specache.generate(model, prompts[0], config=specache.SpeCacheConfig(policy="full"), **GREEDY)
    _together(ask, len(prompts))
    assert wrong == []
    assert model.config._attn_implementation == attention
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("parameters", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_length_dependent_rope_frequencies_are_separate_per_thread(parameters):
    """Short and long sequences run at once, and one thread runs the stock model."""
    more = {"original_max_position_embeddings": 100} if parameters is LONGROPE else {"max_position_embeddings": 100}
    model = llama(rope_parameters=parameters, **more)
    lengths = [60, 130, 85, 190]
    prompts = [prompt(length, seed=length) for length in lengths]
    expected = []
    for ids in prompts:
        fresh = llama(rope_parameters=parameters, **more)
        expected.append(fresh.generate(ids, **GREEDY))
    wrong = []

    def ask(index: int) -> None:
        config = specache.SpeCacheConfig(top_k=10**6, residual=16, group_size=16, policy=["verified", "on-demand"][index % 2])
        for _ in range(4):
            out = specache.generate(model, prompts[index], config=config, **GREEDY)
            if not torch.equal(out, expected[index]):
                wrong.append(lengths[index])

    _together(ask, len(prompts))
    assert wrong == []


def test_a_forward_pass_restores_the_models_rope():
    model = llama(rope_parameters=DYNAMIC, max_position_embeddings=100)
    rotary = model.model.rotary_emb
    model.generate(prompt(150), **GREEDY)
    longest, frequencies = int(rotary.max_seq_len_cached), rotary.inv_freq.clone()
    assert longest > 100
    specache.generate(model, prompt(60), **GREEDY)
    specache.generate(model, prompt(300), **GREEDY)
    assert int(rotary.max_seq_len_cached) == longest and torch.equal(rotary.inv_freq, frequencies)
    assert not rope.is_installed(rotary)


def test_a_model_that_is_copied_while_it_generates_computes_with_its_own_weights(model):
    """The copy has our replacements of its layers too, which must use its own weights."""
    layers = cpu_linear.install(model)
    try:
        copied = copy.deepcopy(model)
    finally:
        cpu_linear.remove(layers)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    fresh = llama()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(0.5)
    assert torch.equal(copied.generate(prompt(60), **GREEDY), fresh.generate(prompt(60), **GREEDY))


def test_a_call_interrupted_while_attaching_restores_the_users_attention(monkeypatch):
    model = llama()
    model.set_attn_implementation("eager")

    def interrupted(model: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cpu_linear, "install", interrupted)
        specache.generate(model, prompt(60), **GREEDY)
    expected = llama().generate(prompt(60), **GREEDY)
    assert torch.equal(model.generate(prompt(60), **GREEDY), expected)
    specache.generate(model, prompt(60), **GREEDY)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model.generate(prompt(60), **GREEDY), expected)


def test_a_model_copied_during_generation_runs_in_stock_and_in_specache(model):
    copies = []

    class Copying(Gate):
        def put(self, value: torch.Tensor) -> None:
            copies.append(copy.deepcopy(model))

    specache.generate(model, prompt(60), streamer=Copying(), max_new_tokens=1)
    expected = model.generate(prompt(60), **GREEDY)
    full = specache.SpeCacheConfig(policy="full")
    for copied in copies:
        assert torch.equal(specache.generate(copied, prompt(60), config=full, **GREEDY), expected)
        assert torch.equal(copied.generate(prompt(60), **GREEDY), expected)


def test_an_interrupted_call_does_not_lock_the_cache():
    """A call that was interrupted before it could release the cache is gone with its frame."""
    in_use = OneCallAtATime()

    def interrupted() -> None:
        block = in_use.by("generate")
        block.__enter__()
        with pytest.raises(UsageError), in_use.by("prefill"):
            pass

    interrupted()
    with in_use.by("prefill"):
        assert not in_use.elsewhere


# Processes

PARENT = """
import json, os, sys, traceback, torch
torch.set_num_threads(2)
import specache
from tests.tiny import llama, prompt
model, ids, GREEDY = llama(), prompt(100), {"max_new_tokens": 4, "do_sample": False}

def run(before, inside, after):
    torch.set_num_threads(2)
    names = dict(globals())
    exec(before, names)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        os.dup2(write, 1)
        os.dup2(write, 2)
        try:
            exec(inside, names)
            code = 0
        except specache.SpeCacheError as error:
            print(type(error).__name__, error)
            code = 7
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with open(read) as said:
        printed = said.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    exec(after, names)
    return [code, printed]

for line in sys.stdin:
    try:
        result = run(*json.loads(line))
    except BaseException:
        result = [1, traceback.format_exc()]
    print(json.dumps(result), flush=True)
"""


@pytest.fixture(scope="module")
def parent() -> Iterator[subprocess.Popen[str]]:
    """A process with several threads, which forks for one test after another."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["."]), "HF_HUB_OFFLINE": "1"}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PARENT], text=True, env=environment, **streams) as process:
        yield process


def _forked(parent: subprocess.Popen[str], before: str, inside: str, after: str = "") -> tuple[int, str]:
    """Return the exit code of the forked process, and what it printed."""
    assert parent.stdin and parent.stdout
    parent.stdin.write(json.dumps([before, inside, after]) + "\n")
    parent.stdin.flush()
    code, printed = json.loads(parent.stdout.readline())
    return code, printed


MADE = "cache = specache.SpeCache(model); specache.generate(model, ids, past_key_values=cache, **GREEDY)"


@pytest.mark.parametrize(
    "inside",
    [
        "specache.generate(model, ids, past_key_values=cache, **GREEDY)",
        "torch.set_num_threads(1); specache.generate(model, ids, past_key_values=cache, **GREEDY)",
        "torch.set_num_threads(1); specache.prefill(model, ids, cache=cache)",
        "cache.fork()",
    ],
)
def test_a_cache_of_the_parent_process_is_refused_in_a_forked_one(parent, inside):
    after = "assert specache.generate(model, ids, past_key_values=cache, **GREEDY).shape[1] == 104"
    code, printed = _forked(parent, MADE, inside, after)
    assert code == 7, printed
    assert "spawn" in printed


def test_a_forked_process_may_generate_with_one_thread_and_a_cache_of_its_own(parent):
    inside = "torch.set_num_threads(1); assert specache.generate(model, ids, **GREEDY).equal(expected)"
    code, printed = _forked(parent, f"{MADE}; expected = specache.generate(model, ids, **GREEDY)", inside)
    assert code == 0, printed


def test_a_forked_process_with_several_threads_is_refused(parent):
    code, printed = _forked(parent, MADE, "specache.generate(model, ids, **GREEDY)")
    assert code == 7, printed
    assert "set_num_threads(1)" in printed


def test_a_forked_process_does_not_free_its_parents_files(parent, tmp_path):
    """Files, an unsaved session and its lock stay."""
    before = f"""
session = specache.Session("one", model, folder={str(tmp_path)!r})
specache.generate(model, ids, past_key_values=session.cache, **GREEDY)
cache = specache.SpeCache(model, specache.SpeCacheConfig(slow_tier="disk:{tmp_path}/rows"))
specache.generate(model, ids, past_key_values=cache, **GREEDY)
"""
    after = f"""
longer = torch.cat([ids, prompt(40, seed=2)], 1)
expected = specache.generate(model, longer, **GREEDY)
for one in (cache, session.cache):
    assert specache.generate(model, longer, past_key_values=one, **GREEDY).equal(expected)
session.save()
session.close()
with specache.Session("one", model, folder={str(tmp_path)!r}) as again:
    assert len(again.token_ids) == 143
"""
    code, printed = _forked(parent, before, "session.close(); cache.close(); del session, cache", after)
    assert code == 0, printed


def _answer(queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(specache.generate(llama(), prompt(100), **GREEDY).tolist())


def test_a_spawned_process_generates(model):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(queue,))
    process.start()
    try:
        assert queue.get(timeout=240) == specache.generate(model, prompt(100), **GREEDY).tolist()
    finally:
        process.join(60)


def test_a_streamer_may_save_the_session_that_it_streams(model, tmp_path):
    """The commands do so after the prefill: if killed later, only the answer is lost."""
    ids, saved = prompt(100), []
    with specache.Session("one", model, folder=tmp_path) as session:

        class Saving:
            def put(self, tokens: torch.Tensor) -> None:
                session.save()
                saved.append(session.saved_tokens)

            def end(self) -> None:
                pass

        answered = specache.generate(model, ids, past_key_values=session.cache, streamer=Saving(), **GREEDY)
        assert torch.equal(answered, model.generate(ids, **GREEDY))
        assert saved[0] == 0 and saved[1:] == list(range(100, answered.shape[1]))
    with specache.Session("one", model, folder=tmp_path) as again:
        assert again.token_ids == answered[0, : saved[-1]].tolist()


def test_a_session_is_not_saved_in_the_middle_of_a_pass(model, tmp_path):
    refused = []
    config = specache.SpeCacheConfig(policy="on-demand")  # every pass of this policy stores a token
    with specache.Session("one", model, config, folder=tmp_path) as session:

        def hook(*_: object) -> None:
            with pytest.raises(UsageError, match="middle of a pass"):
                session.save()
            refused.append(1)

        handle = model.model.layers[1].register_forward_hook(hook)
        try:
            answered = specache.generate(model, prompt(100), past_key_values=session.cache, **GREEDY)
        finally:
            handle.remove()
        assert refused and torch.equal(answered, model.generate(prompt(100), **GREEDY))
