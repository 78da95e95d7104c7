"""Requests from other threads, decoded by a service in a thread of its own."""

from __future__ import annotations

from typing import Any

import pytest

import specache
from specache.engine.events import Event, Finished, Job, NewToken, PromptProgress, Started
from specache.engine.service import EngineService
from tests.tiny import llama, prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def settings(**changes: Any) -> specache.SpeCacheConfig:
    sizes = {"group_size": 16, "residual": 16, "slow_tier": "ram", "policy": "verified", "top_k": 24, "prefill_chunk": 48}
    return specache.SpeCacheConfig(**{**sizes, **changes})


def test_a_job_reports_its_start_its_prompt_its_tokens_and_its_end(model):
    events: list[Event] = []
    with EngineService(model, settings()) as service:
        ticket = service.submit(Job(specache.make_request(model, prompt(90), max_new_tokens=5, do_sample=False)), events.append)
        assert ticket.wait(30)
    expected = specache.generate(model, prompt(90), config=settings(), max_new_tokens=5, do_sample=False)
    assert isinstance(events[0], Started) and isinstance(events[-1], Finished)
    assert [event.token_id for event in events if isinstance(event, NewToken)] == expected[0, 90:].tolist()
    assert [(e.done, e.total) for e in events if isinstance(e, PromptProgress)] == [(0, 90), (48, 90), (90, 90)]
    assert events[-1].reasons == ("length",)


def test_running_answers_end_as_aborted_when_the_service_closes(model):
    events: list[Event] = []
    service = EngineService(model, settings())
    service.submit(Job(specache.make_request(model, prompt(90), max_new_tokens=1500, do_sample=False)), events.append)
    service.close()
    assert isinstance(events[-1], Finished) and events[-1].reasons == ("aborted",)
