"""Requests from any thread, answered by a service as if each ran alone."""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import specache
from specache.engine.chunk_ladder import choose_chunk, ladder
from specache.engine.chunk_timer import ChunkTimer
from specache.engine.events import Finished, Job, NewToken, PromptProgress, Started
from tests.engine.serving import Client, alone, ask, service_of, settings
from tests.sessions.sequences import gemma
from tests.tiny import llama, prompt, ragged


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def test_a_job_reports_its_start_its_prompt_its_tokens_and_its_end(model):
    with service_of(model) as service:
        client = ask(service, model, prompt(90), max_new_tokens=5)
        facts = client.facts
    assert [type(event) for event in client.events[:2]] == [Started, PromptProgress]
    assert client.progress == [0, 32, 64, 90] and {event.total for event in client.of(PromptProgress)} == {90}
    assert client.tokens() == alone(model, prompt(90), max_new_tokens=5)[0]
    assert client.events[-1] == Finished(("length",), facts)
    assert (facts.prompt_tokens, facts.cached_tokens, facts.new_tokens) == (90, 0, 5)
    assert facts.slow_bytes > 0 and facts.fast_bytes > 0 and facts.ordinary_bytes == 94 * 3 * 2 * 2 * 16 * 2
    assert 0 <= facts.hit_rate <= 1 and min(facts.waited_s, facts.prefill_s, facts.decode_s) >= 0


@pytest.mark.parametrize("policy", ["verified", "on-demand", "full"])
@pytest.mark.parametrize("build", [llama, gemma])
def test_requests_of_many_threads_are_answered_as_if_alone(build, policy):
    model, config = build(), settings(policy=policy)
    lengths, new = (90, 13, 141, 60, 33), (12, 30, 5, 1, 9)
    expected = [alone(model, prompt(n, seed=n), config, max_new_tokens=m)[0] for n, m in zip(lengths, new, strict=True)]
    clients: dict[int, Client] = {}
    with service_of(model, config) as service:

        def submit(index: int) -> None:
            clients[index] = ask(service, model, prompt(lengths[index], seed=lengths[index]), max_new_tokens=new[index])

        threads = [threading.Thread(target=submit, args=(index,)) for index in range(len(lengths))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, tokens in enumerate(expected):
            assert clients[index].end().reasons == ("length",)
            assert clients[index].tokens() == tokens
        status = service.status()
    assert (status.waiting, status.running, status.finished, status.failed) == (0, 0, 5, 0)
    assert status.fast_bytes == status.slow_bytes == 0 < status.fast_peak_bytes
    assert (status.slow_peak_bytes > 0) == (policy != "full")
    assert (status.prompt_tokens_read, status.new_tokens) == (sum(lengths), sum(new))
    assert status.error is None and status.first_token_s > 0


def test_a_seed_gives_the_same_answer_whoever_else_is_asked(model):
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 12}
    answers = []
    for others in (0, 3):
        with service_of(model) as service:
            for index in range(others):
                ask(service, model, prompt(40 + index, seed=index), seed=index, **options)
            client = ask(service, model, prompt(70), seed=5, **options)
            client.end()
            answers.append(client.tokens())
    assert answers[0] == answers[1]


def test_three_answers_to_one_prompt_read_it_once(model):
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "num_return_sequences": 3, "max_new_tokens": 9}
    with service_of(model) as service:
        client = ask(service, model, prompt(90), seed=5, **options)
        facts = client.facts
        assert service.status().prompt_tokens_read == facts.prompt_tokens == 90
    assert client.progress == [0, 32, 64, 90]
    with specache.Engine(model, settings()) as engine:
        handle = engine.add(specache.make_request(model, prompt(90), seed=5, **options))
        while engine.step():
            pass
    assert [client.tokens(row) for row in range(3)] == handle.new_token_ids
    assert client.tokens(0) != client.tokens(1) and facts.new_tokens == 27


def test_several_prompts_of_a_request_are_answered_as_by_generate(model):
    ids, mask = ragged(70, 31, 50)
    with service_of(model) as service:
        client = ask(service, model, ids, attention_mask=mask, max_new_tokens=6)
        client.end()
    assert client.progress[-1] == 151
    assert [client.tokens(row) for row in range(3)] == alone(model, ids, attention_mask=mask, max_new_tokens=6)


def test_requests_with_other_policies_share_the_service(model):
    asked = [{}, {"policy": "full"}, {"policy": "on-demand", "top_k": 8}, {"top_k": 4}, {"policy": "none"}, {"policy": "verified"}]
    expected = [
        alone(model, prompt(120, seed=i), settings(**job), max_new_tokens=10, return_dict_in_generate=False)[0]
        for i, job in enumerate(asked)
    ]
    with service_of(model, settings(fast_memory=40_000_000)) as service:
        clients = [ask(service, model, prompt(120, seed=i), job=job, max_new_tokens=10) for i, job in enumerate(asked)]
        for client, tokens in zip(clients, expected, strict=True):
            client.end()
            assert client.tokens() == tokens
        status = service.status()
    assert status.fast_bytes == status.slow_bytes == 0
    assert status.decoded_tokens == 6 * 9
    assert len({tuple(tokens) for tokens in expected}) == len(asked)


def test_the_pairs_of_a_request_hold_at_every_length(model):
    """Also where the service takes more for long sequences."""
    with service_of(model, settings(top_k=4, long_top_k=40, long_from=64)) as service:
        clients = [ask(service, model, prompt(200), job=job, max_new_tokens=10) for job in ({"top_k": 4}, {})]
        for client, changes in zip(clients, ({"top_k": 4}, {"top_k": 40}), strict=True):
            client.end()
            assert client.tokens() == alone(model, prompt(200), settings(**changes), max_new_tokens=10)[0]
    assert clients[0].tokens() != clients[1].tokens()


def test_many_settings_do_not_leave_many_engines(model):
    with service_of(model) as service:
        for pairs in range(1, 9):
            ask(service, model, prompt(60), job={"top_k": pairs}, max_new_tokens=3).end()
        assert service.status().decode_steps == 8 * 2
        assert len(service._engines.all) <= 5


@pytest.mark.parametrize("job", [{"policy": "fastest"}, {"top_k": 0}])
def test_impossible_settings_are_refused_at_once(model, job):
    with service_of(model) as service:
        with pytest.raises(specache.ConfigError):
            ask(service, model, prompt(40), job=job)
        assert service.status().refused == 1


def test_a_request_is_submitted_once(model):
    with service_of(model) as service:
        job = Job(specache.make_request(model, prompt(40), max_new_tokens=3, do_sample=False))
        Client(service, job).end()
        with pytest.raises(specache.UsageError, match="submitted before"):
            service.submit(job, print)


def test_stop_strings_and_end_tokens_end_an_answer_as_stop(model):
    first = alone(model, prompt(50), max_new_tokens=6)[0]
    with service_of(model) as service:
        client = ask(service, model, prompt(50), max_new_tokens=20, eos_token_id=first[3])
        assert client.end().reasons == ("stop",)
    assert client.tokens() == first[: first.index(first[3]) + 1]


def test_the_chunk_is_the_largest_that_is_read_in_time():
    config = settings(prefill_chunk=512)
    assert ladder(config) == [32, 64, 128, 256, 512]
    assert ladder(settings(prefill_chunk=20)) == [20]
    assert ladder(settings(group_size=64, residual=64, prefill_chunk=100)) == [64]
    assert choose_chunk(config, 0.25, nullcontext(lambda tokens: tokens / 600)) == 128
    assert choose_chunk(config, 0.25, nullcontext(lambda tokens: tokens / 1e6)) == 512
    assert choose_chunk(config, 0.25, nullcontext(lambda tokens: 1.0)) == 32


def test_a_chunk_that_does_not_fit_into_fast_memory_is_not_chosen():
    def measure(tokens: int) -> float:
        if tokens > 64:
            raise specache.FastMemoryError("no room")
        return 0.001

    assert choose_chunk(settings(prefill_chunk=512), 0.25, nullcontext(measure)) == 64


def test_the_chunk_is_chosen_once_at_the_start_and_kept(model):
    with service_of(model, settings(prefill_chunk=256), chunk_ms=200) as service:
        assert service.wait_until_ready(60)
        chunk = service.status().chunk_tokens
        assert chunk in ladder(settings(prefill_chunk=256))
        before = service.status()
        assert before.fast_bytes == before.slow_bytes == before.decoded_tokens == before.prefill_s == 0
        for length in (600, 300):
            client = ask(service, model, prompt(length, seed=length))
            client.end()
            assert client.progress == [*range(0, length, chunk), length]
            assert client.tokens() == alone(model, prompt(length, seed=length), max_new_tokens=8)[0]


@pytest.mark.parametrize("build", [llama, gemma])
def test_chunks_are_timed_behind_a_long_text_that_leaves_nothing(build):
    model = build()
    with specache.SpeCache(model, settings(fast_memory=10_000_000)) as cache:
        state = torch.random.get_rng_state()
        with ChunkTimer.over(model, cache) as timer:
            assert timer(32) > 0
            assert cache.resources.budget.used > 0
            assert timer(4000) == math.inf  # more than the model's positions
            with pytest.raises(specache.UsageError, match="timing a chunk"):
                specache.generate(model, prompt(5), past_key_values=cache, max_new_tokens=1)
        assert cache.resources.budget.used == cache.context.row_memory.used == cache.counters.prefill_s == 0
        assert torch.equal(torch.random.get_rng_state(), state)


def test_chunks_are_timed_behind_as_much_as_fits(model):
    with specache.SpeCache(model, settings(fast_memory=170_000)) as cache, ChunkTimer.over(model, cache) as timer:
        assert timer(32) > 0


@pytest.mark.parametrize("options", [{"most_waiting": 0}, {"chunk_ms": 0}, {"chunk_ms": float("nan")}])
def test_wrong_settings_of_a_service_are_refused(model, options):
    with pytest.raises(specache.UsageError, match=next(iter(options))):
        service_of(model, **options)


def test_torch_threads_and_modes_of_the_caller_do_not_matter(model):
    expected = alone(model, prompt(60), max_new_tokens=5)[0]
    with torch.inference_mode(), service_of(model) as service:
        client = ask(service, model, prompt(60), max_new_tokens=5)
        client.end()
    assert client.tokens() == expected
    assert all(isinstance(event.token_id, int) for event in client.of(NewToken))
