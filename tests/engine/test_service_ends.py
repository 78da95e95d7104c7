"""How requests of a service end: aborts, errors, deadlines, and the end of the service."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

import specache
from specache.engine import service as service_module
from specache.engine.engine import Engine
from specache.engine.events import Event, Failed, Finished, NewToken, PromptProgress, Started
from tests.engine.serving import PATIENCE, Client, Gate, alone, ask, service_of, settings
from tests.sessions.sequences import gemma
from tests.tiny import llama, prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def aborts_at(kind: type, count: int = 1) -> Any:
    def when(client: Client, event: Event) -> None:
        if isinstance(event, kind) and len(client.of(kind)) == count:
            client.ticket.abort()

    return when


@pytest.mark.parametrize("build", [llama, gemma])
@pytest.mark.parametrize(("kind", "count"), [(PromptProgress, 2), (PromptProgress, 3), (NewToken, 1), (NewToken, 5)])
def test_an_abort_ends_a_request_within_one_step_and_frees_its_memory(build, kind, count):
    model = build()
    with service_of(model) as service:
        other = ask(service, model, prompt(60, seed=1), max_new_tokens=30)
        client = ask(service, model, prompt(200), when=aborts_at(kind, count), max_new_tokens=500)
        assert client.end().reasons == ("aborted",)
        assert len(client.of(kind)) <= count + 1  # of the step that was running
        assert client.facts.new_tokens == len(client.tokens())
        other.end()
        assert other.tokens() == alone(model, prompt(60, seed=1), max_new_tokens=30)[0]
        status = service.status()
    assert status.fast_bytes == status.slow_bytes == 0 and (status.finished, status.aborted) == (1, 1)


def test_a_request_aborted_in_the_queue_never_starts(model):
    gate = Gate()
    with service_of(model) as service:
        first = ask(service, model, prompt(40), when=gate, max_new_tokens=5)
        gate.wait()
        queued = [ask(service, model, prompt(50 + i, seed=i)) for i in range(3)]
        queued[1].ticket.abort()
        queued[1].ticket.abort()  # twice does no harm
        gate.open()
        assert queued[1].end().reasons == ("aborted",) and not queued[1].of(Started)
        assert queued[1].facts.waited_s > 0 == queued[1].facts.prefill_s
        for client in (first, queued[0], queued[2]):
            assert client.end().reasons == ("length",)


def test_all_answers_of_a_request_are_aborted_together(model):
    with service_of(model) as service:
        client = ask(
            service, model, prompt(90), when=aborts_at(NewToken, 7), do_sample=True, num_return_sequences=3, max_new_tokens=200
        )
        assert client.end().reasons == ("aborted",) * 3
        assert service.status().slow_bytes == 0


def test_an_abort_after_the_end_changes_nothing(model):
    with service_of(model) as service:
        client = ask(service, model, prompt(40))
        end = client.end()
        client.ticket.abort()
        ask(service, model, prompt(41)).end()
        assert client.events[-1] is end and client.ticket.done


def test_a_deadline_ends_requests_that_run_and_those_that_wait(model, monkeypatch):
    gate = Gate()
    with service_of(model) as service:
        running = ask(service, model, prompt(40), when=gate, job={"deadline": time.monotonic() + 3600}, max_new_tokens=1500)
        gate.wait()
        waiting = ask(service, model, prompt(50), job={"deadline": time.monotonic() - 1})
        monkeypatch.setattr(service_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3600))
        gate.open()
        assert running.end().reasons == waiting.end().reasons == ("aborted",)
        assert running.tokens() and not waiting.tokens()


def failing(count: int, error: type[BaseException]) -> Any:
    calls: list[None] = []

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) > count:
            raise error("from a processor")
        return scores

    return process


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_an_error_of_one_request_ends_that_request_alone(model, error):
    with service_of(model) as service:
        good = ask(service, model, prompt(60, seed=1), max_new_tokens=20)
        bad = ask(service, model, prompt(50), logits_processor=[failing(3, error)], max_new_tokens=20)
        last = ask(service, model, prompt(40, seed=2), max_new_tokens=5)
        with pytest.raises((error, specache.OutOfMemoryError) if error is MemoryError else error):
            bad.end()
        assert len(bad.tokens()) == 3
        for client, ids, new in ((good, prompt(60, seed=1), 20), (last, prompt(40, seed=2), 5)):
            client.end()
            assert client.tokens() == alone(model, ids, max_new_tokens=new)[0]
        status = service.status()
    assert (status.failed, status.finished, status.error) == (1, 2, None) and status.fast_bytes == 0


def test_a_processor_that_wants_to_exit_does_not_end_the_service(model):
    with service_of(model) as service:
        bad = ask(service, model, prompt(50), logits_processor=[failing(3, SystemExit)], max_new_tokens=20)
        with pytest.raises(SystemExit):
            bad.end()
        good = ask(service, model, prompt(60, seed=1))
        good.end()
        assert good.tokens() == alone(model, prompt(60, seed=1), max_new_tokens=8)[0]
        assert service.status().error is None


def test_a_request_that_arrives_while_another_exits_is_answered(model):
    with service_of(model) as service:
        arrived: list[Client] = []

        def ask_another(_: Client, event: Event) -> None:
            if isinstance(event, Failed):
                arrived.append(ask(service, model, prompt(60, seed=1)))

        processors = [failing(3, SystemExit)]
        bad = ask(service, model, prompt(50), when=ask_another, logits_processor=processors, max_new_tokens=20)
        with pytest.raises(SystemExit):
            bad.end()
        arrived[0].end()
        assert arrived[0].tokens() == alone(model, prompt(60, seed=1), max_new_tokens=8)[0]
        assert service.status().error is None


def test_an_error_while_a_prompt_is_read_ends_that_request_alone(model, monkeypatch):
    config = settings(slow_tier="ram-inplace", policy="on-demand")
    with service_of(model, config) as service:
        bad_id = 90  # an embedding of NaN
        good = ask(service, model, prompt(60, seed=1).clamp(max=80), suppress_tokens=[bad_id], max_new_tokens=20)
        monkeypatch.setitem(model.model.embed_tokens._parameters, "weight", broken(model, bad_id))
        ids = prompt(100).clamp(max=80)
        ids[0, 70] = bad_id
        bad = ask(service, model, ids)
        with pytest.raises(specache.NonFiniteError):
            bad.end()
        good.end()
        assert service.status().slow_bytes == service.status().fast_bytes == 0


def broken(model: Any, token: int) -> Any:
    weight = model.model.embed_tokens.weight.detach().clone()
    weight[token] = float("nan")
    return type(model.model.embed_tokens.weight)(weight, requires_grad=False)


def test_a_listener_that_raises_ends_its_request_alone(model):
    def raises(client: Client, event: Event) -> None:
        if isinstance(event, NewToken):
            raise OSError("nobody listens")

    with service_of(model) as service, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bad = ask(service, model, prompt(50), when=raises, max_new_tokens=1500)
        good = ask(service, model, prompt(60, seed=1))
        assert bad.ticket.wait(PATIENCE) and good.end().reasons == ("length",)
        assert len(bad.of(NewToken)) == 1 and not bad.of(Finished)
        assert service.status().aborted == 1
    assert any("nobody listens" in str(warning.message) for warning in caught)


def test_an_error_of_the_loop_fails_every_request_and_is_reported(model, monkeypatch):
    gate = Gate()
    service = service_of(model)
    running = ask(service, model, prompt(40), when=gate, max_new_tokens=500)
    gate.wait()
    waiting = [ask(service, model, prompt(50 + i)) for i in range(3)]

    def fails(self: Engine) -> bool:
        raise AssertionError("a mistake in the engine")

    monkeypatch.setattr(Engine, "step", fails)
    gate.open()
    for client in (running, *waiting):
        with pytest.raises(AssertionError, match="a mistake"):
            client.end()
    error = service.status().error
    assert isinstance(error, AssertionError) and service.status().running == service.status().waiting == 0
    with pytest.raises(specache.ServiceClosedError, match="a mistake in the engine"):
        ask(service, model, prompt(40))
    assert not service.wait_until_ready(1)
    service.close()
    assert service.status().fast_bytes == 0


def test_failed_is_the_last_event_and_comes_once(model):
    with service_of(model) as service:
        bad = ask(service, model, prompt(50), logits_processor=[failing(2, RuntimeError)], max_new_tokens=20)
        with pytest.raises(RuntimeError):
            bad.end()
        ask(service, model, prompt(40)).end()
    assert [type(event) for event in bad.events].count(Failed) == 1 and isinstance(bad.events[-1], Failed)


def test_threads_that_submit_abort_and_ask_at_once_find_everything_in_order(model):
    """Eight threads, switched often, and what each finds is consistent."""
    found: list[BaseException] = []
    before = sys.getswitchinterval()

    def work(number: int) -> None:
        try:
            for turn in range(5):
                client = ask(
                    service, model, prompt(20 + 9 * number, seed=turn), job={"top_k": 8} if number == 3 else {}, max_new_tokens=6
                )
                status = service.status()
                assert status.error is None and status.waiting + status.running <= 8
                if (number + turn) % 3 == 0:
                    client.ticket.abort()
                assert client.end().reasons in (("length",), ("aborted",))
        except BaseException as error:
            found.append(error)

    with service_of(model) as service:
        sys.setswitchinterval(1e-5)
        try:
            threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
        status = service.status()
    assert found == [] and status.finished + status.aborted == 40 and status.fast_bytes == status.slow_bytes == 0


def test_a_request_of_another_model_is_refused_before_it_is_queued(model):
    with service_of(model) as service:
        with pytest.raises(specache.UsageError, match=r"another model.*make_request"):
            ask(service, llama(seed=1), prompt(8))
        assert ask(service, model, prompt(8)).end().reasons == ("length",)
