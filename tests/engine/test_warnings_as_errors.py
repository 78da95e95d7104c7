"""Where warnings are errors (`python -W error`), one request's warning ends no other request."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import specache
from specache.engine.events import Event, Finished, Job, NewToken
from specache.engine.prefix_store import PrefixStore
from tests.engine.serving import PATIENCE, Client, alone, service_of, settings
from tests.tiny import llama, prompt

IN_PLACE = settings(slow_tier="ram-inplace")


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(autouse=True)
def errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def asked(service: specache.EngineService, model: Any, ids: torch.Tensor, when: Any = None, tokens: int = 8) -> Client:
    return Client(service, Job(specache.make_request(model, ids, do_sample=False, max_new_tokens=tokens)), when)


@pytest.mark.parametrize("kind", [NewToken, Finished])
def test_a_listener_that_fails_ends_its_own_request_alone(model, kind, caplog):
    def fail(client: Client, event: Event) -> None:
        if isinstance(event, kind):
            raise ValueError("the listener is gone")

    with service_of(model) as service:
        other, failing = asked(service, model, prompt(50), tokens=40), asked(service, model, prompt(60, 1), fail)
        assert failing.ticket.wait(PATIENCE) and other.ticket.wait(PATIENCE)
        later = asked(service, model, prompt(40, 2))
        assert later.ticket.wait(PATIENCE)
        assert [other.tokens(), later.tokens()] == [
            *alone(model, prompt(50), max_new_tokens=40),
            *alone(model, prompt(40, 2)),
        ]
    assert "the listener is gone" in caplog.text


def test_a_callback_at_the_end_that_fails_leaves_the_engine_to_others(model, caplog):
    def fail(handle: Any) -> None:
        raise ValueError("the callback is gone")

    engine = specache.Engine(model, settings())
    first = engine.add(specache.make_request(model, prompt(50), do_sample=False, max_new_tokens=2), on_end=fail)
    second = engine.add(specache.make_request(model, prompt(60, 1), do_sample=False, max_new_tokens=8))
    while not (first.done and second.done):
        engine.step()
    assert second.result()[:, 60:].tolist() == alone(model, prompt(60, 1))
    assert "on_end failed" in caplog.text
    engine.close()


def test_a_prompt_whose_stored_prefix_is_damaged_is_read_again(model, tmp_path, caplog):
    ids = prompt(700)
    store = PrefixStore(model, IN_PLACE, folder=tmp_path)
    with service_of(model, IN_PLACE, prefixes=store) as service:
        assert asked(service, model, ids).ticket.wait(PATIENCE)
    for path in _rows(tmp_path):
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)
    longer = torch.cat([ids, prompt(3, 1)], dim=1)
    store = PrefixStore(model, IN_PLACE, folder=tmp_path)
    with service_of(model, IN_PLACE, prefixes=store) as service:
        client = asked(service, model, longer)
        assert client.ticket.wait(PATIENCE) and client.of(Finished)
        assert [client.tokens()] == alone(model, longer, IN_PLACE)
    assert "is read again" in caplog.text


def test_a_store_that_fails_costs_time_only(model, monkeypatch, caplog):
    store = PrefixStore(model, IN_PLACE)

    def fail(*arguments: Any) -> None:
        raise ValueError("the store is broken")

    monkeypatch.setattr(store, "keep", fail)
    with service_of(model, IN_PLACE, prefixes=store) as service:
        for seed in (0, 1):
            client = asked(service, model, prompt(50, seed))
            assert client.ticket.wait(PATIENCE) and [client.tokens()] == alone(model, prompt(50, seed), IN_PLACE)
    assert "which costs time only" in caplog.text


def test_a_folder_in_use_leaves_prefixes_in_memory(model, tmp_path, caplog):
    first = PrefixStore(model, IN_PLACE, folder=tmp_path)
    second = PrefixStore(model, IN_PLACE, folder=tmp_path)
    assert "kept in memory only" in (second.status().problem or "") and "kept in memory only" in caplog.text
    for store in (first, second):
        store.close()


def _rows(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.rows"))
    assert found
    return found
