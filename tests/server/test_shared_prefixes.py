"""Prompts that begin alike are read once, over HTTP, and each key's are its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from specache.cli.serve_options import ServerOptions
from specache.engine.prefix_store import PrefixStore
from specache.server.settings import ServerSettings
from tests.server.tiny_server import SHORT, chat, complete, printable_model, prompt_of, running, stream

DOCUMENT = "What is read once is not read again. " * 10
ALICE, BOB = "a" * 24, "b" * 24
CHAT = "/v1/chat/completions"


def serving(**options: object):
    model = printable_model()
    return running(model, prefixes=PrefixStore(model, SHORT), **options)


def cached(answer: dict) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def answer_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def test_a_second_question_about_a_document_reads_the_question_alone(client):
    with serving() as sharing:
        first, second = chat(sharing, DOCUMENT + "Who?"), chat(sharing, DOCUMENT + "When?")
        assert cached(first) == 0 and cached(second) >= len(DOCUMENT)
        assert answer_of(second) == answer_of(chat(client, DOCUMENT + "When?"))
        status = sharing.get("/v1/status").json()
        assert status["prompt_tokens_cached"] == cached(second) and status["requests"][0]["cached_tokens"] == cached(second)
        read = len(prompt_of(DOCUMENT + "Who?")) + len(prompt_of(DOCUMENT + "When?")) - cached(second)
        assert status["prompt_tokens_read"] == read
        assert f"specache_cached_prompt_tokens_total {float(cached(second))}" in sharing.get("/metrics").text


def test_a_stream_says_it_too():
    with serving() as sharing:
        chat(sharing, DOCUMENT)
        body = {"messages": [{"role": "user", "content": DOCUMENT}], "max_tokens": 2, "stream_options": {"include_usage": True}}
        chunks, _ = stream(sharing, CHAT, body)
        assert cached(chunks[-1]) >= len(DOCUMENT)


def test_echo_with_log_probabilities_reads_the_prompt_in_full():
    with serving() as sharing:
        complete(sharing, DOCUMENT)
        assert cached(complete(sharing, DOCUMENT)) > 0
        scored = complete(sharing, DOCUMENT, echo=True, logprobs=1, max_tokens=1)
        assert cached(scored) == 0 and None not in scored["choices"][0]["logprobs"]["token_logprobs"][1:]


def test_prefixes_of_another_key_or_session_are_not_found():
    with serving(keys={"alice": ALICE, "bob": BOB}) as sharing:

        def ask(key: str, **fields: object) -> int:
            body = {"messages": [{"role": "user", "content": DOCUMENT}], "max_tokens": 2, **fields}
            response = sharing.post(CHAT, json=body, headers={"x-api-key": key})
            return cached(response.json())

        assert ask(ALICE) == 0 and ask(ALICE) > 0
        assert ask(BOB) == 0 and ask(ALICE, session="report") == 0
        assert ask(ALICE, session="report") > 0 and ask(BOB, session="report") == 0


@pytest.mark.parametrize(("settings", "shares"), [({"share_prefixes": True}, True), ({"prefix_sharing": False}, False)])
def test_all_keys_may_share_and_nothing_may_be_kept(settings, shares):
    with serving(keys={"alice": ALICE, "bob": BOB}, settings=ServerSettings(**settings)) as sharing:
        body = {"messages": [{"role": "user", "content": DOCUMENT}], "max_tokens": 2}
        found = [cached(sharing.post(CHAT, json=body, headers={"x-api-key": key}).json()) for key in (ALICE, BOB)]
        assert found[0] == 0 and (found[1] > 0) is shares


def test_sessions_stay_apart_where_keys_share():
    model, options = printable_model(), ServerOptions(share_prefixes=True)
    with running(model, settings=options.settings(), prefixes=options.prefix_store(model, SHORT)) as server:
        found = [cached(complete(server, DOCUMENT, session=name)) for name in ("a", "b", "a")]
        assert found[:2] == [0, 0] and found[2] > 0


def test_slow_memory_bounds_running_requests_also_where_nothing_is_kept():
    model, options = printable_model(), ServerOptions(prefix_sharing=False, slow_memory="1KB")
    with running(model, settings=options.settings(), prefixes=options.prefix_store(model, SHORT)) as server:

        def ask(text: str) -> int:
            return cached(complete(server, text + DOCUMENT, max_tokens=100))

        def most_bytes() -> int:
            return server.get("/v1/status").json()["slow_peak_bytes"]

        assert ask("a") == 0
        of_one = most_bytes()
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(ask, "bcd")) == [0, 0, 0]
        assert 0 < most_bytes() <= of_one  # one after the other: no two fit
        assert server.get("/v1/status").json()["prefixes"]["stored"] == 0


def test_a_policy_and_a_number_of_pairs_are_this_requests():
    with serving() as server:
        plain = chat(server, DOCUMENT, max_tokens=60)
        low_bits = chat(server, DOCUMENT, max_tokens=60, policy="none")
        few = chat(server, DOCUMENT, max_tokens=60, top_k_pairs=1)
        assert len({answer_of(one) for one in (plain, low_bits, few)}) > 1
        assert answer_of(chat(server, DOCUMENT, max_tokens=60)) == answer_of(plain)
