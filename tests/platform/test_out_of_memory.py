"""Memory that runs out in the middle of generating: what was generated is there, the cache goes on,
the message helps.
"""

from __future__ import annotations

import errno
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import specache
from specache.cache.sizes import on_disk
from specache.config import SpeCacheConfig
from specache.engine import runs
from specache.errors import FastMemoryError, NonFiniteError, OutOfMemoryError, SlowTierError
from specache.kernels import dispatch
from specache.kernels.torch import operations as torch_ops
from specache.planning.advice import smaller
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import MemoryPlan, plan
from specache.platform.out_of_memory import is_out_of_memory, on_the_gpu
from tests.our_threads import our_new_threads
from tests.tiny import llama, prompt

LAYERS = 3
CUDA_SAYS = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB."
RAISED = {
    "gpu": lambda: torch.OutOfMemoryError(CUDA_SAYS),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def expected(model: Any) -> torch.Tensor:
    """Return the undisturbed answer."""
    with dispatch.using("torch"):
        return greedy(model, prompt(90), config=settings())


@pytest.fixture(autouse=True)
def plain_kernels(torch_kernels: None) -> None:
    """Use one Python function per operation, which a test can replace."""


def settings(**changes: Any) -> SpeCacheConfig:
    return SpeCacheConfig(**{"group_size": 16, "residual": 16, "slow_tier": "ram", "policy": "verified", "top_k": 8, **changes})


def greedy(model: Any, ids: torch.Tensor, new: int = 16, **arguments: Any) -> torch.Tensor:
    return specache.generate(model, ids, max_new_tokens=new, do_sample=False, **arguments)


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, operation: str, error: Any, after: int = 0, layer: int = 0, times: int | None = None
) -> Iterator[list[int]]:
    """Inside, a kernel raises once `after` tokens are there, from `layer` of the pass on: for ever,
    or so many times.

    Yields the layer of each call that raised. Every layer of a pass calls `score` once, before the
    other kernels.
    """
    real, put = getattr(torch_ops, operation), runs.sample_next
    score = torch_ops.score
    tokens, layers, raised = [0], [-1], []

    def taking(*arguments: Any) -> None:
        put(*arguments)
        tokens[0] += 1

    def scoring(*arguments: Any) -> Any:
        layers[0] = layers[0] + 1 if tokens[0] >= after else -1
        return failing_kernel(*arguments) if operation == "score" else score(*arguments)

    def failing_kernel(*arguments: Any) -> Any:
        if layers[0] >= layer and (times is None or len(raised) < times):
            raised.append(layers[0])
            raise error()
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "sample_next", taking)
        patch.setattr(torch_ops, operation, failing_kernel)
        patch.setattr(torch_ops, "score", scoring)
        yield raised


@pytest.mark.parametrize("operation", ["score", "select", "rescore", "attend"])
@pytest.mark.parametrize(("layer", "kind"), list(enumerate(RAISED)))
def test_the_cache_and_the_tokens_are_those_of_the_last_complete_step(model, expected, monkeypatch, operation, layer, kind):
    ids = prompt(90)
    with specache.SpeCache(model, settings(hot_set=0.0)) as cache:
        with failing(monkeypatch, operation, RAISED[kind], after=9, layer=layer) as raised, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(OutOfMemoryError, match="after 9 new tokens") as caught:
                greedy(model, ids, past_key_values=cache)
        assert raised[0] == layer
        assert caught.value.new_token_ids == expected[:, 90:99].tolist()
        assert type(caught.value.__cause__) is type(RAISED[kind]())
        assert {layer.length for layer in cache.sequences[0].layers.values()} == {98}
        assert cache.finish_reasons == ["error"]
        assert torch.equal(greedy(model, ids, past_key_values=cache), expected)
        assert cache.finish_reasons == ["length"]


@pytest.mark.parametrize("policy", ["verified", "on-demand", "speculative", "previous"])
def test_a_failed_step_is_retried_without_the_hot_set_and_changes_no_token(model, monkeypatch, policy):
    config = settings(policy=policy, hot_set=0.5)
    ids = prompt(100)
    expected = greedy(model, ids, config=config)
    with specache.SpeCache(model, config) as cache:
        specache.prefill(model, ids, cache=cache)
        held = cache.memory().hot
        for layer in range(LAYERS):
            with failing(monkeypatch, "attend", RAISED["gpu"], after=3 + layer, layer=layer, times=1):
                with pytest.warns(RuntimeWarning, match=r"hot sets \([\d,]+ bytes\) were freed") as said:
                    assert torch.equal(greedy(model, ids, past_key_values=cache), expected)
                assert len(said) == 1
        assert 0 < cache.memory().hot < held


def test_what_the_hot_set_held_is_given_back_to_the_budget(model):
    config = settings(hot_set=0.5, fast_memory=10**7)
    with specache.SpeCache(model, config) as cache:
        specache.prefill(model, prompt(150), cache=cache)
        before = cache.resources.budget.used
        freed = cache.sequences[0].free_hot_sets()
        assert freed > 0 and cache.resources.budget.used == before - freed


def test_without_a_hot_set_a_failed_step_is_not_retried(model, monkeypatch):
    with failing(monkeypatch, "attend", RAISED["cpu"], after=2, layer=1) as raised, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OutOfMemoryError):
            greedy(model, prompt(90), config=settings(slow_tier="ram-inplace", policy="on-demand"))
    assert raised == [1]


def test_out_of_memory_in_model_generate_with_a_streamer_keeps_the_tokens(model, monkeypatch):
    ids, got, ended = prompt(90), [], []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            got.append(value.flatten().tolist())

        def end(self) -> None:
            ended.append(True)

    with failing(monkeypatch, "score", MemoryError, after=7), pytest.raises(OutOfMemoryError) as caught:
        model.generate(
            ids,
            custom_generate=specache.decode,
            config=settings(hot_set=0.0),
            streamer=Streamer(),
            max_new_tokens=30,
            do_sample=False,
        )
    assert caught.value.new_token_ids == [[token for step in got[1:] for token in step]]
    assert len(got) == 8 and ended == [True]
    assert model.config._attn_implementation == "sdpa"
    assert not our_new_threads()


def test_every_sequence_of_a_batch_has_its_own_tokens_without_padding(model, monkeypatch):
    ids = torch.cat([prompt(90, 1), prompt(90, 2)])
    whole = greedy(model, ids, config=settings())[:, 90:]
    end = next(token for token in whole[0].tolist() if token not in whole[1].tolist())
    stops_at = whole[0].tolist().index(end) + 1
    arguments = {"eos_token_id": end, "pad_token_id": 0, "config": settings(hot_set=0.0)}
    with failing(monkeypatch, "select", MemoryError, after=stops_at + 4), pytest.raises(OutOfMemoryError) as caught:
        greedy(model, ids, **arguments)
    assert caught.value.new_token_ids == [whole[0, :stops_at].tolist(), whole[1, : stops_at + 4].tolist()]


def test_out_of_memory_in_a_background_read_is_recognised(model, monkeypatch):
    from specache.tiers.transfer import Transfer

    real, calls = Transfer.__call__, []

    def failing(self: Transfer, host: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) > 12 and threading.current_thread() is not threading.main_thread():
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return real(self, host)

    monkeypatch.setattr(Transfer, "__call__", failing)
    with specache.SpeCache(model, settings(hot_set=0.0)) as cache:
        with pytest.raises(OutOfMemoryError, match="CUDA out of memory") as caught:
            greedy(model, prompt(90), past_key_values=cache)
        assert isinstance(caught.value.__cause__, SlowTierError) and caught.value.new_token_ids


def test_out_of_memory_while_prefilling_has_no_new_tokens(model, monkeypatch):
    with failing(monkeypatch, "quantise", MemoryError, layer=-1):
        with pytest.raises(OutOfMemoryError, match=r"before the first new token.*prefill_chunk=") as caught:
            greedy(model, prompt(500), config=settings(prefill_chunk=500))
        assert caught.value.new_token_ids is None
        with specache.SpeCache(model, settings()) as cache:
            with pytest.raises(OutOfMemoryError):
                specache.prefill(model, prompt(500), cache=cache)
            assert cache.memory().slow == 0


def test_the_message_advises_settings_that_need_less(model, monkeypatch):
    with failing(monkeypatch, "score", MemoryError), pytest.raises(OutOfMemoryError) as caught:
        greedy(model, prompt(90), 4, config=settings(hot_set=0.0, bits=4))
    assert "in main memory" in str(caught.value)
    assert "bits=2 (needs " in str(caught.value) and "bits=1 (needs " in str(caught.value)
    assert "bits=4" not in str(caught.value) and "batch=" not in str(caught.value) and "hot_set" not in str(caught.value)


LONG = [PlannedSequence(20_000, 100)] * 4


def on_a_cpu(config: SpeCacheConfig, planned: MemoryPlan) -> int:
    return planned.decode.total + (0 if on_disk(config) else planned.slow)


def on_a_gpu(config: SpeCacheConfig, planned: MemoryPlan) -> int:
    return planned.decode.total


@pytest.mark.parametrize(
    ("changes", "needs", "names"),
    [
        ({"bits": 4, "top_k": 64}, on_a_cpu, ["batch", "hot_set", "slow_tier", "bits", "bits", "top_k"]),
        ({"bits": 1, "hot_set": 0.0}, on_a_cpu, ["batch", "slow_tier"]),
        ({"bits": 1, "hot_set": 0.0}, on_a_gpu, ["batch"]),
        ({"policy": "full"}, on_a_cpu, ["batch", "slow_tier and policy"]),
        ({"policy": "full"}, on_a_gpu, ["batch", "slow_tier and policy", "policy"]),
        ({"slow_tier": "disk:rows", "bits": 2}, on_a_cpu, ["batch", "hot_set", "bits"]),
    ],
)
def test_only_what_is_smaller_is_advised(model, changes, needs, names):
    with specache.SpeCache(model, settings(**{**changes, "slow_tier": "ram"})) as cache:
        config = cache.config.with_changes(slow_tier=changes.get("slow_tier", "ram"))
        now = needs(config, plan(cache.resources.dimensions, config, LONG))
        found = smaller(cache.resources.dimensions, config, LONG, needs)
    assert [" and ".join(suggestion.changes) for suggestion in found] == names
    assert all(suggestion.fast_bytes < now for suggestion in found)


@pytest.mark.parametrize("error", [FastMemoryError("the budget"), SlowTierError("the disk"), NonFiniteError("NaN")])
def test_our_own_errors_keep_their_type_and_carry_the_tokens(model, expected, monkeypatch, error):
    with failing(monkeypatch, "rescore", lambda: error, after=4), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(type(error)) as caught:
            greedy(model, prompt(90), config=settings())
    assert caught.value is error
    assert caught.value.new_token_ids == expected[:, 90:94].tolist()
    assert any("new_token_ids" in note for note in caught.value.__notes__)


def test_other_errors_are_raised_unchanged(model, monkeypatch):
    with failing(monkeypatch, "score", lambda: RuntimeError("a bug"), after=3), pytest.raises(RuntimeError, match=r"^a bug$"):
        greedy(model, prompt(90), config=settings())


def test_the_failed_pass_leaves_no_tensors_behind(model, monkeypatch):
    import gc
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    def failing(scores: torch.Tensor, *arguments: Any) -> Any:
        held.append(weakref.ref(scores))
        raise MemoryError

    monkeypatch.setattr(torch_ops, "attend", failing)
    with pytest.raises(OutOfMemoryError) as caught, pytest.warns(RuntimeWarning):
        greedy(model, prompt(90), config=settings())
    gc.collect()
    assert caught.value is not None and len(held) == 2
    assert [scores() for scores in held] == [None, None]


@pytest.mark.parametrize(
    ("error", "ran_out", "gpu"),
    [
        (torch.OutOfMemoryError(CUDA_SAYS), True, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True, True),
        (RuntimeError("CUDA error: out of memory"), True, False),  # pinned memory, perhaps
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 99 bytes"), True, False),
        (MemoryError(), True, False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True, False),
        (OSError(errno.ENOSPC, "No space left on device"), False, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, False),
        (SlowTierError("a file"), False, False),
    ],
)
def test_out_of_memory_is_recognised(error, ran_out, gpu):
    assert is_out_of_memory(error) == ran_out
    assert on_the_gpu(error) == gpu
