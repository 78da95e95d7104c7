"""What was read once is not read again: forks of stored and of running prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specache
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


def test_a_text_that_begins_with_another_replaces_it(server, family):
    trunk = text(400)
    server.read(trunk[:200])
    server.read(trunk)
    most = 1 if family == "dense" else 2  # the windows of the longer one may not go back to 200
    assert server.store.status().prefixes <= most
    server.read(trunk[:200])
    server.read(trunk)
    assert server.store.status().prefixes <= most
    assert server.store.match("", trunk[:201]) >= 150


def test_generated_tokens_are_not_reused(server, model):
    trunk = text(300)
    tokens, _ = server.ask(trunk)
    again = [*trunk, *tokens, *text(30, seed=9)]
    assert server.ask(again)[0] == fresh(model, server.base.config, again)[0]
    assert server.reused[-1] <= 300


def test_a_prompt_that_was_not_read_to_the_end_is_kept_as_far_as_it_was(server, model):
    trunk = text(400)
    cache = server.base.fork()
    specache.prefill(model, torch.tensor([trunk[:200]]), cache=cache)
    (sequence,), cache.sequences = cache.sequences, []
    server.store.keep("", sequence)
    cache.close()
    assert server.ask(trunk)[0] == fresh(model, server.base.config, trunk)[0]
    assert server.reused[-1] == 200


def test_a_sequence_that_was_freed_is_forgotten(server):
    running = server.begin(text(300))
    running.close()
    server.read(text(300))
    assert server.reused[-1] == 0
    assert server.store.status().prefixes == 1


class TestRoom:
    """Memory of stored prefixes is given up, the least recently used first."""

    @pytest.fixture
    def server(self, model: Any, tmp_path: Any) -> Any:
        server = Server(model, config(), PrefixStore(model, config()))
        yield server
        server.close()

    def stored(self, server: Server, texts: list[list[int]]) -> list[bool]:
        return [server.store.match("", one) > 0 for one in texts]

    def test_the_least_recently_used_goes_first(self, server):
        texts = [text(200, seed) for seed in range(4)]
        for one in texts:
            server.read(one)
        server.read(texts[0])
        assert server.store.make_room(1, 0)
        assert self.stored(server, texts) == [True, False, True, True]
        assert server.store.make_room(0, 1)
        assert self.stored(server, texts) == [True, False, False, True]

    def test_bytes_are_really_free(self, server):
        for seed in range(4):
            server.read(text(300, seed))
        before = server.used
        wanted = before // 2
        assert server.store.make_room(wanted, 0)
        assert before - server.used >= wanted
        assert server.store.status().prefixes >= 1

    def test_pages_that_a_request_shares_stay(self, server):
        trunk = text(400)
        server.read(trunk)
        running = server.begin(trunk)
        assert not server.store.make_room(server.used + 1, 0)  # everything went, and it is not that much
        assert server.store.status().prefixes == 0
        assert server.store.match("", trunk) == 399  # the running request has it
        server.end(running)
        assert server.store.status().prefixes == 1

    def test_everything_can_go(self, server):
        for seed in range(3):
            server.read(text(200, seed))
        assert server.store.make_room(server.used, 0)
        assert server.used == 0

    def test_rows_in_memory_stay_below_their_limit(self, model):
        one = Server(model, config(), PrefixStore(model, config()))
        one.read(text(300))
        size = one.store.status().slow_bytes
        one.close()
        server = Server(model, config(), PrefixStore(model, config(), most_slow_bytes=3 * size))
        for seed in range(6):
            server.read(text(300, seed))
            assert server.store.status().slow_bytes <= 3 * size
        assert server.store.status().prefixes == 3
        server.close()

    def test_a_fork_that_does_not_fit_evicts_others(self, model):
        probe = Server(model, config(), PrefixStore(model, config()))
        probe.read(text(300))
        size = probe.store.status().fast_bytes
        probe.close()
        limit = config(fast_memory=int(3.9 * size) + (1 << 21))
        server = Server(model, limit, PrefixStore(model, limit))
        texts = [text(300, seed) for seed in range(3)]
        for one in texts:
            server.read(one)
        hold = server.base.resources.budget
        cache = server.base.fork()
        with hold.reserved(hold.left, "a request"):
            sequence = server.store.take("", texts[2], cache)
        assert sequence is not None
        assert self.stored(server, texts) == [False, True, True] or self.stored(server, texts) == [False, False, True]
        cache.sequences = [sequence]
        cache.close()
        server.close()


def test_hits_are_counted(server):
    trunk = text(300)
    server.ask(trunk)
    server.ask(trunk)
    counters = server.store.status().counters
    assert (counters.hits, counters.misses, counters.cached_tokens) == (1, 1, server.reused[-1])


def test_stored_prefixes_do_not_divide_the_hot_set(server):
    living = server.base.context.living_sequences
    cache = server.begin(text(300))
    context = cache.context
    assert context.living_sequences == 1
    server.end(cache)
    assert context.living_sequences == 0
    assert server.base.context.living_sequences == living


@pytest.mark.parametrize("new", [1, 2, 3])
def test_a_request_that_ended_after_a_token_or_two_leaves_its_prompt_whole(model, new, monkeypatch):
    checkpoints_every(monkeypatch, 256)
    server, trunk = Server(model, config(), PrefixStore(model, config())), text(300)
    running = server.begin(trunk)
    specache.generate(model, torch.tensor([trunk]), past_key_values=running, max_new_tokens=new, do_sample=False)
    server.end(running)
    tokens, logits = server.ask(trunk)
    expected, right = fresh(model, config(), trunk)
    assert tokens == expected
    torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)
    server.close()
