"""Prompts that begin alike are read once, and answered as after a prefill of their own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import specache
from specache.engine.events import Event, NewToken, PromptProgress, Started
from specache.engine.prefix_store import PrefixStore
from specache.engine.service import EngineService
from tests.engine.serving import Client, Gate, alone, ask, service_of, settings
from tests.engine.test_model_families import LONGROPE
from tests.sessions.sequences import gemma
from tests.tiny import llama, prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def after(prefix: Tensor, length: int, seed: int) -> Tensor:
    return torch.cat([prefix, prompt(length, seed)], dim=1)


def sharing(model: Any, config: specache.SpeCacheConfig | None = None, **options: Any) -> EngineService:
    config = config or settings()
    return service_of(model, config, prefixes=PrefixStore(model, config, **options))


def asked_in_turn(service: EngineService, model: Any, prompts: list[Tensor], **options: Any) -> list[Client]:
    clients = []
    for ids in prompts:
        clients.append(ask(service, model, ids, **options))
        clients[-1].end()
    return clients


def test_a_prefix_that_has_no_room_after_all_leaves_nothing_behind(model):
    """Its prompt is read in full, and the request after it finds all the memory."""
    document = prompt(260, 0)
    config = settings(fast_memory=330_000)
    with sharing(model, config) as service:
        gate = Gate(lambda event: True)
        first = ask(service, model, after(document, 35, 42), when=gate, job={"top_k": 8}, max_new_tokens=10)
        others = [ask(service, model, ids, max_new_tokens=n) for ids, n in ((prompt(1, 8), 7), (after(document, 21, 28), 5))]
        gate.open()
        for client in (first, *others):
            client.end()
        assert service.status().running_fast_bytes == 0
        ids = torch.cat([document[:, :40], prompt(1, 8)], dim=1)
        last = ask(service, model, ids, max_new_tokens=1)
        assert last.end().reasons == ("length",) and last.tokens() == alone(model, ids, config, max_new_tokens=1)[0]


@pytest.mark.parametrize("build", [llama, gemma])
@pytest.mark.parametrize(
    ("policy", "code"), [("verified", "rotated"), ("verified", "kivi"), ("previous", "rotated"), ("full", "rotated")]
)
def test_an_answer_over_a_reused_prefix_is_that_of_a_fresh_prefill(build, policy, code):
    model, config = build(), settings(policy=policy, code=code)
    length = 150 if build is llama else 600  # sliding windows go back to a checkpoint, of every 256 tokens
    document = prompt(length, seed=1)
    prompts = [after(document, n, seed=n) for n in (7, 30, 55)] + [document, document[:, : length - 49]]
    with sharing(model, config) as service:
        clients = asked_in_turn(service, model, prompts)
        status = service.status()
    for client, ids in zip(clients, prompts, strict=True):
        assert client.tokens() == alone(model, ids, config)[0]
        assert client.progress[0] == client.cached == client.facts.cached_tokens
    assert clients[0].cached == 0
    assert [client.cached for client in clients] == ([0, 150, 150, 149, 100] if build is llama else [0, 512, 512, 512, 512])
    assert status.prompt_tokens_cached == sum(client.cached for client in clients)
    assert status.prompt_tokens_read == sum(ids.shape[1] for ids in prompts) - status.prompt_tokens_cached


def test_a_prefix_is_shared_while_its_request_decodes_and_after_it_ended(model):
    document = prompt(200, seed=1)
    with sharing(model) as service:
        first = ask(service, model, after(document, 5, 2), max_new_tokens=1500)
        second = ask(service, model, after(document, 9, 3))
        second.end()
        assert not first.ticket.done and second.cached == 200
        first.ticket.abort()
        first.end()
        third = ask(service, model, after(document, 4, 4))
        third.end()
        assert third.cached == 200
    assert second.tokens() == alone(model, after(document, 9, 3))[0]
    assert third.tokens() == alone(model, after(document, 4, 4))[0]
    assert first.tokens() == alone(model, after(document, 5, 2), max_new_tokens=len(first.tokens()))[0]


def test_requests_that_come_together_wait_for_the_one_that_reads_their_prefix(model):
    document, gate = prompt(200, seed=1), Gate()
    prompts = [after(document, 3 + i, seed=i) for i in range(6)]
    with sharing(model) as service:
        ask(service, model, prompt(20), when=gate)
        gate.wait()
        clients = [ask(service, model, ids, job={"top_k": 12} if i % 2 else {}) for i, ids in enumerate(prompts)]
        gate.open()
        for client in clients:
            client.end()
        assert [client.cached for client in clients] == [0] + [200] * 5
        assert service.status().prompt_tokens_read == 20 + 203 + sum(range(4, 9))
    for i, client in enumerate(clients):
        assert client.tokens() == alone(model, prompts[i], settings(top_k=12 if i % 2 else 24))[0]


@pytest.mark.parametrize("build", [llama, gemma])
def test_what_was_read_of_an_aborted_prompt_need_not_be_read_again(build):
    model, ids = build(), prompt(300, seed=1)

    def aborts(client: Client, event: Event) -> None:
        if isinstance(event, PromptProgress) and event.done >= 128:
            client.ticket.abort()

    with sharing(model) as service:
        first = ask(service, model, ids, when=aborts)
        assert first.end().reasons == ("aborted",) and first.progress[-1] == 128
        second = ask(service, model, ids)
        second.end()
        assert second.cached == 128
        assert service.status().prompt_tokens_read == 300
    assert second.tokens() == alone(model, ids)[0]


def test_an_answer_is_read_when_it_comes_back_in_a_prompt(model):
    """Its keys and values were computed over low-bit pairs."""
    ids = prompt(150, seed=1)
    with sharing(model) as service:
        (first,) = asked_in_turn(service, model, [ids], max_new_tokens=40)
        turn = torch.cat([ids, torch.tensor([first.tokens()]), prompt(12, seed=2)], dim=1)
        (second,) = asked_in_turn(service, model, [turn])
    assert second.cached == 150
    assert second.tokens() == alone(model, turn)[0]


def test_prompts_of_one_request_share_what_they_begin_with(model):
    document = prompt(120, seed=1)
    ids = torch.cat([after(document, 20, seed) for seed in (2, 3)])
    with sharing(model) as service:
        client = ask(service, model, ids)
        assert client.facts.cached_tokens == 120 and client.facts.prompt_tokens == 280
        three = ask(service, model, ids[:1], do_sample=True, num_return_sequences=3, seed=1)
        assert three.facts.cached_tokens == 139 and three.progress == [139, 140]
    assert [client.tokens(row) for row in (0, 1)] == alone(model, ids)


def test_owners_never_share(model):
    ids = prompt(150, seed=1)
    with sharing(model) as service:
        cached = []
        for owner in ("ann", "bob", "ann"):
            client = ask(service, model, ids, job={"owner": owner})
            client.end()
            cached.append(client.cached)
    assert cached == [0, 0, 149]


def test_what_is_not_cacheable_is_not_kept(model):
    ids = prompt(150, seed=1)
    with sharing(model) as service:
        cached = []
        for cacheable in (False, True, False, True):
            client = ask(service, model, ids, job={"cacheable": cacheable})
            client.end()
            cached.append(client.cached)
        assert cached == [0, 0, 149, 149]


def test_policies_share_a_prefix_that_their_low_bit_copies_have_in_common(model):
    ids = prompt(150, seed=1)
    jobs: list[dict[str, Any]] = [
        {"policy": "on-demand"},
        {},
        {"policy": "full"},
        {"policy": "none", "top_k": 8},
        {"policy": "full"},
    ]
    with sharing(model) as service:
        for job, cached in zip(jobs, (0, 149, 149, 149, 149), strict=True):
            client = ask(service, model, ids, job=job)
            client.end()
            assert client.cached == cached
            assert client.tokens() == alone(model, ids, settings(**job))[0]


def test_a_prompt_on_the_other_side_of_a_rope_switch_is_read_in_full():
    model = llama(max_position_embeddings=4096, rope_parameters=LONGROPE)
    config = settings(prefill_chunk=4096)
    short, long = prompt(80, seed=1), prompt(300, seed=1)  # the frequencies change after 100 tokens
    long[:, :80] = short
    prompts = [short, after(short, 9, 2), long, after(long, 7, 3), after(short, 5, 4)]
    with sharing(model, config) as service, warnings.catch_warnings():
        warnings.simplefilter("error")
        clients = asked_in_turn(service, model, prompts, max_new_tokens=6)
    for client, ids in zip(clients, prompts, strict=True):
        assert client.tokens() == alone(model, ids, config, max_new_tokens=6)[0]
    assert [client.cached > 0 for client in clients] == [False, True, False, True, True]


def test_a_model_whose_rows_depend_on_each_other_reads_every_prompt(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        quantised = torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear}, dtype=torch.qint8)
    ids = prompt(150, seed=1)
    with sharing(quantised) as service:
        clients = asked_in_turn(service, quantised, [ids, ids])
    assert [client.cached for client in clients] == [0, 0]
    assert clients[0].tokens() == clients[1].tokens() == alone(quantised, ids)[0]


def test_stored_prefixes_make_room_for_requests(model):
    """The budget holds, and no request waits for what nobody uses."""
    with service_of(model, settings()) as service:
        asked_in_turn(service, model, [prompt(200)], max_new_tokens=20)
        one = service.status().fast_peak_bytes
    config = settings(fast_memory=one * 3 // 2)
    prompts = [prompt(200, seed=i % 5) for i in range(12)]
    with service_of(model, config, prefixes=PrefixStore(model, config)) as service:
        clients = [ask(service, model, ids, max_new_tokens=20) for ids in prompts]
        for client, ids in zip(clients, prompts, strict=True):
            client.end()
            assert client.tokens() == alone(model, ids, max_new_tokens=20)[0]
        status = service.status()
    assert status.fast_peak_bytes <= status.fast_budget_bytes
    assert status.finished == 12 and status.prefixes.counters.evicted > 0


def test_a_prefix_that_many_use_at_once_is_held_once(model):
    """As many fit as share pages, not as many as would fit alone."""
    document = prompt(1500, seed=1)
    with sharing(model, settings(fast_memory=10**9)) as service:
        asked_in_turn(service, model, [document], max_new_tokens=2)
        before = service.status().fast_bytes
        gate = Gate()
        ask(service, model, prompt(20), when=gate)
        gate.wait()
        clients = [ask(service, model, after(document, 5, seed=i), max_new_tokens=60) for i in range(6)]
        gate.open()
        for client in clients:
            client.end()
        after_all = service.status().fast_bytes
    assert after_all - before < 6 * before


def test_prefixes_are_shared_over_rows_on_a_disk(model, tmp_path):
    config = settings(slow_tier="disk", slow_dir=str(tmp_path))
    document = prompt(200, seed=1)
    prompts = [after(document, 4 + i, seed=i) for i in range(3)]
    with sharing(model, config) as service:
        first = ask(service, model, prompts[0], max_new_tokens=60)
        clients = asked_in_turn(service, model, prompts[1:])
        first.end()
        assert service.status().slow_peak_bytes >= first.facts.slow_bytes > 0
    assert [client.cached for client in clients] == [200, 200]
    for client, ids in zip(clients, prompts[1:], strict=True):
        assert client.tokens() == alone(model, ids, config)[0]
    assert first.tokens() == alone(model, prompts[0], config, max_new_tokens=60)[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_error_of_the_store_costs_the_prefix_and_nothing_else(model, monkeypatch):
    def fails(*args: Any) -> Any:
        raise OSError("the store is broken")

    ids = prompt(150, seed=1)
    for name in ("begin", "add_running", "keep"):
        with sharing(model) as service, monkeypatch.context() as patched, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patched.setattr(PrefixStore, name, fails)
            clients = asked_in_turn(service, model, [ids, ids])
            assert all(client.tokens() == alone(model, ids)[0] for client in clients)
        assert service.status().slow_bytes == service.status().fast_bytes == 0
        assert any("the store is broken" in str(warning.message) for warning in caught)


def test_closing_frees_what_is_stored(model):
    service = sharing(model)
    client = ask(service, model, prompt(150), max_new_tokens=1500)
    asked_in_turn(service, model, [prompt(100, seed=3)])
    service.close()
    assert client.end().reasons == ("aborted",)
    assert service.status().fast_bytes == service.status().slow_bytes == service.status().prefixes.prefixes == 0


def test_started_comes_before_the_first_token_with_what_was_cached(model):
    with sharing(model) as service:
        client = asked_in_turn(service, model, [prompt(150), prompt(150)])[1]
    kinds = [type(event) for event in client.events]
    assert kinds[0] is Started and kinds.index(NewToken) > kinds.index(PromptProgress)
