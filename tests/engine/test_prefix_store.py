"""What was read once is not read again: forks of stored and of running prompts."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from specache.engine.prefix_store import PrefixStore
from tests.engine.prefixes import LEAST, MODELS, TIERS, Server, branch, config, fresh, text
from tests.sessions.sequences import checkpoints_every

CUTS = {"in the residual": 390, "inside a page": 300, "at a page's border": 256, "at a group's border": 288, "near the start": 97}


@pytest.fixture(scope="module", params=list(MODELS))
def family(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    return MODELS[family]()


@pytest.fixture(params=TIERS)
def server(request: Any, model: Any, tmp_path: Any, monkeypatch: Any) -> Any:
    checkpoints_every(monkeypatch, 48)
    settings = config(request.param, tmp_path)
    server = Server(model, settings, PrefixStore(model, settings))
    yield server
    server.close()
    gc.collect()
    assert server.used == 0


@pytest.mark.parametrize("where", CUTS)
def test_answers_equal_those_of_a_fresh_prefill(server, model, family, where):
    trunk = text(400)
    server.ask(trunk)
    again = branch(trunk, CUTS[where], 430, seed=1)
    tokens, logits = server.ask(again)
    least = CUTS[where] - (48 if family == "hybrid" else 0)
    assert max(LEAST, least) <= server.reused[-1] <= CUTS[where] or (family == "hybrid" and where == "near the start")
    expected, right = fresh(model, server.base.config, again)
    assert tokens == expected
    torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)


def test_a_prompt_that_is_decoding_is_shared(server, model):
    trunk = text(400)
    running = server.begin(trunk)
    first = server.go_on(running, trunk)
    again = branch(trunk, 400, 420, seed=2)
    assert server.ask(again)[0] == fresh(model, server.base.config, again)[0]
    assert server.reused[-1] == 400
    server.end(running)
    assert first[0] == fresh(model, server.base.config, trunk)[0]


def test_a_branch_of_a_branch_goes_on_from_there(server, model):
    trunk = text(400)
    server.ask(trunk)
    second = branch(trunk, 350, 450, seed=3)
    server.ask(second)
    third = branch(second, 440, 480, seed=4)
    tokens, _ = server.ask(third)
    assert server.reused[-1] > 350
    assert tokens == fresh(model, server.base.config, third)[0]


def test_one_token_is_always_left_to_run(server, model):
    trunk = text(300)
    first = server.ask(trunk)
    tokens, logits = server.ask(trunk)
    assert server.reused[-1] == 299
    assert tokens == first[0]
    torch.testing.assert_close(logits, first[1], rtol=1e-4, atol=1e-4)


def test_a_short_prefix_is_not_worth_it(server):
    trunk = text(300)
    server.ask(trunk)
    server.ask(branch(trunk, LEAST - 1, 200, seed=5))
    server.ask(text(LEAST - 1))
    assert server.reused[1:] == [0, 0]


def test_owners_see_nothing_of_each_other(server):
    trunk = text(300)
    server.ask(trunk, "one")
    assert server.store.match("other", trunk) == 0
    server.ask(trunk, "other")
    assert server.reused[-1] == 0


def test_all_owners_share_if_they_are_told_to(model, tmp_path):
    settings = config()
    server = Server(model, settings, PrefixStore(model, settings, share_owners=True))
    server.ask(text(300), "one")
    server.ask(text(300), "other")
    assert server.reused[-1] == 299
    server.close()
