"""Random requests that come, hang up and share prefixes: each is answered as if alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specache.engine.events import Event, NewToken, PromptProgress, Started
from specache.engine.prefix_store import PrefixStore
from tests.engine import serving
from tests.engine.serving import Client, alone, ask, service_of
from tests.tiny import llama, prompt


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        document, shared, own: which of three documents its prompt begins with, how many tokens of
            it, and how many tokens of its own follow.
        new: new tokens.
        hangs_up: the event at which the client hangs up, counted from the first.
        pairs: `top_k` of the request.
    """

    document: int
    shared: int
    own: int
    new: int
    hangs_up: int | None
    pairs: int | None

    @property
    def ids(self) -> Tensor:
        return torch.cat([prompt(260, self.document)[:, : self.shared], prompt(self.own, self.own + 7)], dim=1)


REQUESTS = st.builds(
    Asked,
    document=st.integers(0, 2),
    shared=st.sampled_from([0, 40, 150, 260]),
    own=st.integers(1, 40),
    new=st.integers(1, 12),
    hangs_up=st.none() | st.integers(0, 14),
    pairs=st.sampled_from([None, None, None, 8]),
)


LONG: dict[bool, dict[str, Any]] = {False: {}, True: {"long_top_k": 48, "long_from": 96}}  # some prompts become long ones


@cache
def model() -> Any:
    return llama()


@cache
def answer(asked: Asked, long: bool) -> list[int]:
    """The request's tokens alone, with a fresh prefill."""
    pairs = LONG[long] if asked.pairs is None else {"top_k": asked.pairs}
    return alone(model(), asked.ids, serving.settings(**pairs), max_new_tokens=asked.new)[0]


def submitted(service: Any, asked: Asked) -> Client:
    def when(client: Client, event: Event) -> None:
        if len(client.events) - 1 == asked.hangs_up:
            client.ticket.abort()

    job = {} if asked.pairs is None else {"top_k": asked.pairs}
    return ask(service, model(), asked.ids, when=when, job=job, max_new_tokens=asked.new)


def fitting_with_its_prefix() -> list[tuple[Asked, float]]:
    """Requests of which the last has room only because it goes on from what another left."""
    asked = ((0, 40, 24), (0, 260, 1), (1, 150, 1), (0, 150, 1))
    return [(Asked(*each, new=1, hangs_up=None, pairs=None), 0.0) for each in asked]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@example(requests=fitting_with_its_prefix(), room=1.0, keeps=True, long=False)
@given(
    requests=st.lists(st.tuples(REQUESTS, st.sampled_from([0.0, 0.0, 0.005, 0.03])), min_size=1, max_size=9),
    room=st.sampled_from([None, 1.0, 1.3, 3.0]),
    keeps=st.booleans(),
    long=st.booleans(),
)
def test_every_request_is_answered_as_if_alone_whatever_else_happens(requests, room, keeps, long):
    least = 430_000 if long else 330_000
    config = serving.settings(fast_memory=None if room is None else int(room * least), **LONG[long])
    store = PrefixStore(model(), config) if keeps else None
    with service_of(model(), config, prefixes=store) as service:
        clients = []
        for asked, pause in requests:
            clients.append((asked, submitted(service, asked)))
            time.sleep(pause)
        for asked, client in clients:
            reasons = client.end().reasons
            tokens = client.tokens()
            assert tokens == answer(asked.__class__(**{**vars(asked), "hangs_up": None}), long)[: len(tokens)]
            assert reasons == ("length",) if len(tokens) == asked.new and asked.hangs_up is None else reasons
            assert reasons == ("length",) or (reasons == ("aborted",) and asked.hangs_up is not None)
            in_order(client)
        status = service.status()
        assert status.error is None and status.failed == 0 and status.finished + status.aborted == len(requests)
        assert room is None or status.fast_peak_bytes <= status.fast_budget_bytes
        assert keeps or status.slow_bytes == status.fast_bytes == 0
    assert service.status().slow_bytes == service.status().fast_bytes == 0


def in_order(client: Client) -> None:
    """Assert that events come in the promised order."""
    kinds = [type(event) for event in client.events]
    if Started in kinds:
        assert kinds.index(Started) == 0 and kinds.count(Started) == 1
        assert client.progress == sorted(client.progress) and client.progress[0] == client.cached
    if NewToken in kinds:
        assert PromptProgress not in kinds[kinds.index(NewToken) :]
        assert client.progress[-1] == client.of(PromptProgress)[0].total
