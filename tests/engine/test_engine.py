"""Requests that join and leave a running batch: each as if it ran alone."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import specache
from specache.engine.engine import Engine
from specache.engine.handle import Handle
from tests.engine.test_model_families import LONGROPE
from tests.sessions.sequences import gemma
from tests.tiny import llama, prompt, ragged

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def settings(**changes: Any) -> specache.SpeCacheConfig:
    sizes = {"group_size": 16, "residual": 16, "slow_tier": "ram", "policy": "verified", "top_k": 24, "prefill_chunk": 40}
    return specache.SpeCacheConfig(**{**sizes, **changes})


def alone(model: Any, ids: Tensor, config: specache.SpeCacheConfig, **options: Any) -> Any:
    with torch.random.fork_rng():
        output = specache.generate(model, ids, config=config, **{**GREEDY, **options})
    output.past_key_values.close()
    return output


def run(engine: Engine) -> None:
    while engine.step():
        pass


def same(handle: Handle, expected: Any) -> None:
    assert torch.equal(handle.result(0), expected.sequences)
    logits, wanted = torch.stack(handle.request.state.logits), torch.stack(expected.logits)
    torch.testing.assert_close(logits, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("tier", ["ram", "disk", "ram-inplace"])
@pytest.mark.parametrize("policy", list(specache.Policy))
@pytest.mark.parametrize("build", [llama, gemma])
def test_requests_that_join_and_leave_are_answered_as_if_alone(tmp_path, build, policy, tier):
    if tier == "ram-inplace" and policy in (specache.Policy.SPECULATIVE, specache.Policy.PREVIOUS, specache.Policy.NONE):
        pytest.skip("nothing is prefetched in place")
    model = build()
    config = settings(policy=policy, slow_tier=tier, **({"slow_dir": str(tmp_path)} if tier == "disk" else {}))
    lengths, new = (90, 13, 141, 60), (12, 30, 5, 1)
    expected = [alone(model, prompt(n, seed=n), config, max_new_tokens=m) for n, m in zip(lengths, new, strict=True)]
    with specache.Engine(model, config) as engine:
        handles = []
        for n, m in zip(lengths, new, strict=True):
            handles.append(engine.add(specache.make_request(model, prompt(n, seed=n), max_new_tokens=m, **GREEDY)))
            for _ in range(4):
                engine.step()
        run(engine)
        for handle, output in zip(handles, expected, strict=True):
            same(handle, output)
            assert handle.finish_reasons == ["length"]
        assert engine.cache.sequences == []
        assert engine.cache.held_bytes() == 0


def test_a_request_with_several_padded_prompts_is_answered_as_by_generate(model):
    ids, mask = ragged(70, 31, 50)
    expected = alone(model, ids, settings(), attention_mask=mask, max_new_tokens=9)
    with specache.Engine(model, settings()) as engine:
        engine.add(specache.make_request(model, prompt(44), max_new_tokens=20, **GREEDY))
        handle = engine.add(specache.make_request(model, ids, attention_mask=mask, max_new_tokens=9, **GREEDY))
        run(engine)
        same(handle, expected)


def test_each_request_has_its_own_seed_settings_stop_and_streamer(model):
    class Streamer:
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.ended += 1

    options = [
        {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 15},
        {"do_sample": True, "top_p": 0.7, "max_new_tokens": 9},
        {"do_sample": False, "repetition_penalty": 1.4, "max_new_tokens": 25},
    ]
    together: list[list[Any]] = []
    for order in ([0, 1, 2], [2, 0, 1]):
        with specache.Engine(model, settings()) as engine:
            handles: dict[int, Handle] = {}
            streamers = [Streamer() for _ in options]
            rows: list[list[int]] = [[] for _ in options]
            for i in order:
                request = specache.make_request(
                    model, prompt(50 + i, seed=i), seed=i, streamer=streamers[i],
                    callback=lambda row, token, got=rows[i]: got.append(token), **options[i],
                )  # fmt: skip
                handles[i] = engine.add(request)
                engine.step()
            run(engine)
            together.append([handles[i].result(0).tolist() for i in range(3)])
            for i, streamer in enumerate(streamers):
                assert streamer.got == handles[i].result(0)[0].tolist() and streamer.ended == 1
                assert rows[i] == handles[i].new_token_ids[0]
    assert together[0] == together[1]
    expected = specache.generate(model, prompt(52, seed=2), config=settings(), **options[2])
    assert together[0][2] == expected.tolist()


def failing_after(count: int, error: type[BaseException]) -> Any:
    calls: list[None] = []

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) > count:
            raise error("from a processor")
        return scores

    return process


def test_an_error_of_one_request_ends_that_request_alone(model):
    expected = [alone(model, prompt(n, seed=n), settings(), max_new_tokens=15) for n in (90, 40)]
    with specache.Engine(model, settings()) as engine:
        first = engine.add(specache.make_request(model, prompt(90, seed=90), max_new_tokens=15, **GREEDY))
        bad = engine.add(
            specache.make_request(model, prompt(60), logits_processor=[failing_after(4, RuntimeError)], max_new_tokens=15, **GREEDY)
        )
        last = engine.add(specache.make_request(model, prompt(40, seed=40), max_new_tokens=15, **GREEDY))
        run(engine)
        same(first, expected[0])
        same(last, expected[1])
        with pytest.raises(RuntimeError, match="from a processor"):
            bad.result(0)
        assert bad.finish_reasons == ["error"] and len(bad.new_token_ids[0]) == 4
        assert engine.cache.sequences == []


def unreadable(pairs):
    raise specache.SlowTierError("The rows cannot be read.")


def test_a_pass_that_fails_for_one_request_runs_without_it(model, monkeypatch):
    """Reading its rows fails: the pass is undone, and the other requests decode."""
    config = settings(policy="on-demand")
    expected = alone(model, prompt(90, seed=90), config, max_new_tokens=15)
    with specache.Engine(model, config) as engine:
        good = engine.add(specache.make_request(model, prompt(90, seed=90), max_new_tokens=15, **GREEDY))
        bad = engine.add(specache.make_request(model, prompt(80), max_new_tokens=15, **GREEDY))
        for _ in range(8):
            engine.step()
        rows = bad.request.sequences[0].compressed[1].row_fetcher
        for begin in ("begin_at_once", "ready_at_once"):
            monkeypatch.setattr(rows, begin, unreadable)
        run(engine)
        same(good, expected)
        with pytest.raises(specache.SlowTierError) as raised:
            bad.result(0)
        assert raised.value.new_token_ids == bad.new_token_ids


def test_ctrl_c_ends_the_request_it_met_and_a_later_one_runs(model):
    expected = alone(model, prompt(40, seed=40), settings(), max_new_tokens=15)
    with specache.Engine(model, settings()) as engine:
        processor = failing_after(3, KeyboardInterrupt)
        met = engine.add(specache.make_request(model, prompt(60), logits_processor=[processor], max_new_tokens=15, **GREEDY))
        with pytest.raises(KeyboardInterrupt):
            run(engine)
        assert met.finish_reasons == ["interrupted"]
        other = engine.add(specache.make_request(model, prompt(40, seed=40), max_new_tokens=15, **GREEDY))
        run(engine)
        same(other, expected)


@pytest.mark.parametrize("when", ["waiting", "prefilling", "running"])
def test_an_aborted_request_frees_its_memory(model, when):
    with specache.Engine(model, settings()) as engine:
        other = engine.add(specache.make_request(model, prompt(200, seed=1), max_new_tokens=20, **GREEDY))
        handle = engine.add(specache.make_request(model, prompt(130), max_new_tokens=30, **GREEDY))
        for _ in range({"waiting": 1, "prefilling": 7, "running": 14}[when]):
            engine.step()
        engine.abort(handle)
        run(engine)
        assert handle.finish_reasons == ["aborted"]
        assert bool(handle.new_token_ids[0]) == (when == "running")
        same(other, alone(model, prompt(200, seed=1), settings(), max_new_tokens=20))
        assert engine.cache.held_bytes() == 0


def test_requests_wait_for_memory_and_one_that_never_fits_is_refused(model):
    needed = {}
    for count in (1, 2):
        with specache.Engine(model, settings()) as engine:
            for i in range(count):
                engine.add(specache.make_request(model, prompt(150, seed=i), max_new_tokens=20, **GREEDY))
            run(engine)
            needed[count] = engine.cache.resources.budget.peak
    config = settings(fast_memory=(needed[1] * 3 + needed[2] * 2) // 5)
    with specache.Engine(model, config) as engine:
        handles = [engine.add(specache.make_request(model, prompt(150, seed=i), max_new_tokens=20, **GREEDY)) for i in range(3)]
        never = engine.add(specache.make_request(model, prompt(2000, seed=9), max_new_tokens=20, **GREEDY))
        run(engine)
        for i, handle in enumerate(handles):
            same(handle, alone(model, prompt(150, seed=i), settings(), max_new_tokens=20))
        with pytest.raises(specache.FastMemoryError, match="fast_memory"):
            never.result(0)


def test_requests_are_added_and_aborted_from_other_threads(model):
    texts = [prompt(30 + 7 * i, seed=i) for i in range(12)]
    handles: list[Handle] = []
    with specache.Engine(model, settings()) as engine:

        def add(some: list[Tensor]) -> None:
            for ids in some:
                handles.append(engine.add(specache.make_request(model, ids, max_new_tokens=8, **GREEDY)))
                if ids.shape[1] % 2 == 0:
                    engine.abort(handles[-1])

        threads = [threading.Thread(target=add, args=(texts[i::3],)) for i in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or engine.step():
            engine.step()
        for thread in threads:
            thread.join()
        run(engine)
        assert len(handles) == 12 and all(handle.done for handle in handles)
        for handle in handles:
            if handle.finish_reasons == ["length"]:
                ids = torch.tensor(handle.request.token_ids)
                same(handle, alone(model, ids, settings(), max_new_tokens=8))


def test_a_step_in_another_thread_and_in_a_callback_are_refused(model):
    refused: list[BaseException] = []
    with specache.Engine(model, settings()) as engine:

        def callback(row: int, token: int) -> None:
            for ask in (engine.step, lambda: threading_call(engine.step)):
                try:
                    ask()
                except specache.UsageError as error:
                    refused.append(error)

        engine.add(specache.make_request(model, prompt(30), callback=callback, max_new_tokens=2, **GREEDY))
        run(engine)
    assert len(refused) == 4 and all("Engine.step" in str(error) for error in refused)


def threading_call(call: Any) -> None:
    raised: list[BaseException] = []

    def target() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def test_a_closed_engine_aborts_its_requests_and_refuses_new_ones(model):
    engine = specache.Engine(model, settings())
    handles = [engine.add(specache.make_request(model, prompt(90, seed=i), max_new_tokens=20, **GREEDY)) for i in range(3)]
    for _ in range(5):
        engine.step()
    engine.close()
    assert [handle.finish_reasons for handle in handles] == [["aborted"]] * 3
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(specache.UsageError, match="closed"):
        engine.add(specache.make_request(model, prompt(9), max_new_tokens=2))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("seed", 2**64, "seed must be a whole number"),
        ("seed", -(2**63) - 1, "seed must be a whole number"),
        ("seed", 1.5, "not 1.5"),
        ("seed", "1", "not '1'"),
        ("callback", 3, "callback must be a function"),
        ("config", specache.SpeCacheConfig(bits=1), r"takes no config.*specache\.Engine\(model, config\)"),
        ("past_key_values", None, "takes no past_key_values"),
    ],
)
def test_what_a_request_cannot_have_is_refused_by_name(model, argument, value, message):
    value = specache.SpeCache(model) if argument == "past_key_values" else value
    with pytest.raises(specache.UsageError, match=message):
        specache.make_request(model, prompt(5), max_new_tokens=2, **{argument: value})


@pytest.mark.parametrize("seed", [-1, -(2**63), 0, 2**63 - 1, 2**64 - 1, np.int64(5)])
def test_every_seed_of_pytorch_is_one_of_a_request(model, seed):
    assert specache.make_request(model, prompt(5), max_new_tokens=2, do_sample=True, seed=seed) is not None


def test_a_request_that_ran_is_refused(model):
    with specache.Engine(model, settings()) as engine:
        request = specache.make_request(model, prompt(20), max_new_tokens=2, **GREEDY)
        engine.add(request)
        run(engine)
        with pytest.raises(specache.UsageError, match="make_request"):
            engine.add(request)


def test_a_dropped_engine_restores_the_models_attention(model):
    engine = specache.Engine(model, settings())
    engine.add(specache.make_request(model, prompt(90), max_new_tokens=20, **GREEDY))
    engine.step()
    del engine
    assert model.config._attn_implementation == "sdpa"


def test_a_second_thread_on_the_engines_cache_is_refused(model):
    told: list[str] = []
    with specache.SpeCache(model, settings()) as cache:

        class Streamer:
            def put(self, value: Tensor) -> None:
                try:
                    threading_call(lambda: specache.generate(model, prompt(5), past_key_values=cache, max_new_tokens=1))
                except specache.UsageError as error:
                    told.append(str(error))

            def end(self) -> None:
                pass

        specache.generate(model, prompt(30), past_key_values=cache, max_new_tokens=1, streamer=Streamer())
    assert told and all("specache.Engine" in text for text in told)


@pytest.mark.parametrize("where", ["put", "end"])
def test_an_error_of_a_streamer_ends_its_request_alone(model, where):
    class Streamer:
        def put(self, value: Tensor) -> None:
            if where == "put":
                raise OSError("nobody reads")

        def end(self) -> None:
            if where == "end":
                raise OSError("nobody reads")

    expected = alone(model, prompt(40, seed=40), settings(), max_new_tokens=9)
    with specache.Engine(model, settings()) as engine:
        request = specache.make_request(model, prompt(30), max_new_tokens=3, streamer=Streamer(), **GREEDY)
        failing = engine.add(request)
        sound = engine.add(specache.make_request(model, prompt(40, seed=40), max_new_tokens=9, **GREEDY))
        run(engine)
        same(sound, expected)
        with pytest.raises(OSError, match="nobody reads"):
            failing.result(0)


@pytest.mark.parametrize("good_first", [True, False])
def test_a_step_of_several_passes_repeats_none_that_succeeded(monkeypatch, good_first):
    """Requests on both sides of a RoPE switch need a pass each, and the pass of one fails."""
    model = llama(max_position_embeddings=4096, rope_parameters=LONGROPE)
    config = settings(policy="on-demand", prefill_chunk=4096)
    lengths = {"good": 140, "bad": 60}
    expected = alone(model, prompt(lengths["good"], seed=1), config, max_new_tokens=20)
    with specache.Engine(model, config) as engine:
        handles = {}
        for name in ("good", "bad") if good_first else ("bad", "good"):
            request = specache.make_request(model, prompt(lengths[name], seed=1), max_new_tokens=20, **GREEDY)
            handles[name] = engine.add(request)
        for _ in range(5):
            engine.step()
        fetcher = handles["bad"].request.sequences[0].compressed[1].row_fetcher
        for begin in ("begin_at_once", "ready_at_once"):
            monkeypatch.setattr(fetcher, begin, unreadable)
        run(engine)
        same(handles["good"], expected)
        with pytest.raises(specache.SlowTierError):
            handles["bad"].result(0)


def test_requests_that_ended_take_no_share_of_the_hot_set(model):
    """Its bytes are divided by the sequences that exist, also while their handles are kept."""
    with specache.Engine(model, settings(hot_set=1_000_000)) as engine:
        handles = [engine.add(specache.make_request(model, prompt(60, seed=i), max_new_tokens=3, **GREEDY)) for i in range(3)]
        run(engine)
        assert all(handle.done for handle in handles) and engine.cache.context.living_sequences == 0


def test_a_handle_is_waited_for_and_tells_its_end(model):
    ended: list[Handle] = []
    with specache.Engine(model, settings()) as engine:
        handle = engine.add(specache.make_request(model, prompt(60), max_new_tokens=3, **GREEDY), ended.append)
        assert not handle.wait(0)
        run(engine)
        assert handle.wait(0) and ended == [handle]


def test_a_listener_that_fails_does_not_stop_the_engine(model):
    def fails(handle: Handle) -> None:
        raise OSError("nobody listens")

    with specache.Engine(model, settings()) as engine, pytest.warns(RuntimeWarning, match="nobody listens"):
        handles = [engine.add(specache.make_request(model, prompt(60), max_new_tokens=3, **GREEDY), fails) for _ in range(2)]
        run(engine)
        assert [handle.finish_reasons for handle in handles] == [["length"], ["length"]]


def test_engines_beside_each_other_share_one_budget(model):
    config = settings(fast_memory=3_000_000)
    with specache.Engine(model, config) as engine, engine.beside(policy="full") as other:
        first = engine.add(specache.make_request(model, prompt(90, seed=1), max_new_tokens=12, **GREEDY))
        second = other.add(specache.make_request(model, prompt(70, seed=2), max_new_tokens=12, **GREEDY))
        while engine.step() | other.step():
            assert engine.cache.resources.budget is other.cache.resources.budget
        same(first, alone(model, prompt(90, seed=1), config, max_new_tokens=12))
        same(second, alone(model, prompt(70, seed=2), config.with_changes(policy="full"), max_new_tokens=12))
        with pytest.raises(specache.UsageError, match="full"):
            other.beside(policy="verified")


def test_a_request_of_another_model_is_refused(model):
    """Its processors, end tokens and checks are the other model's."""
    request = specache.make_request(llama(seed=1), prompt(8), max_new_tokens=2)
    with specache.Engine(model, settings()) as engine, pytest.raises(specache.UsageError, match=r"another model.*make_request"):
        engine.add(request)
