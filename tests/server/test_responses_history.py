"""Stored responses: going on from one, showing, listing and deleting it, and its limits."""

from __future__ import annotations

import pytest

from specache.engine.prefix_store import PrefixStore
from specache.server.settings import ServerSettings
from tests.server.live_server import wait_until
from tests.server.response_events import PATH, checked_item, checked_response, respond, streamed, text_of
from tests.server.tiny_server import SHORT, error_of, post, printable_model, running

LONG = "The old tree had forty rings. " * 8
KEYS = {"alice": "a" * 24, "bob": "b" * 24}


def messages_of(*turns: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * len(turns), turns, strict=False)]


def missing(client, code: int = 404, **fields):
    error = respond(client, "Go on", code, **fields)
    assert error["code"] == "previous_response_not_found" and error["param"] == "previous_response_id"
    assert fields["previous_response_id"] in error["message"]
    return error


def test_a_response_goes_on_from_another_as_if_all_had_been_sent(client):
    first = respond(client, LONG)
    second = respond(client, "How many?", previous_response_id=first["id"])
    third = respond(client, "Sure?", previous_response_id=second["id"])
    sent = messages_of(LONG, text_of(first), "How many?", text_of(second), "Sure?")
    whole = post(client, "/v1/chat/completions", {"messages": sent, "max_tokens": 8, "temperature": 0})
    assert text_of(third) == whole["choices"][0]["message"]["content"]
    assert third["usage"]["input_tokens"] == whole["usage"]["prompt_tokens"]
    assert third["previous_response_id"] == second["id"]
    assert text_of(respond(client, sent)) == text_of(third)


def test_what_was_read_before_is_not_read_again():
    model = printable_model()
    with running(model, prefixes=PrefixStore(model, SHORT)) as client:
        first = respond(client, LONG)
        second = respond(client, "How many?", previous_response_id=first["id"])
        third = respond(client, "Sure?", previous_response_id=second["id"], instructions="Be brief.")
        cached = [one["usage"]["input_tokens_details"]["cached_tokens"] for one in (first, second, third)]
        assert cached == [0, first["usage"]["input_tokens"], 0]  # answers are read again (docs/prefixes.md)


def test_the_tokens_of_a_prompt_are_counted_without_an_answer(client):
    first = respond(client, LONG)
    asked = {"input": "How many?", "previous_response_id": first["id"], "instructions": "Be brief."}
    counted = post(client, f"{PATH}/input_tokens", asked)
    expected = respond(client, asked["input"], previous_response_id=first["id"], instructions="Be brief.")["usage"]["input_tokens"]
    assert counted == {"object": "response.input_tokens", "input_tokens": expected}


def test_one_response_may_be_gone_on_from_twice(client):
    first = respond(client, "Name a tree.")
    one, other = (respond(client, text, previous_response_id=first["id"]) for text in ("Another.", "A bird."))
    sent = messages_of("Name a tree.", text_of(first), "A bird.")
    assert text_of(other) == text_of(respond(client, sent))
    assert one["id"] != other["id"]


def test_instructions_are_not_carried_over(client):
    first = respond(client, "Hello", instructions="Be brief.")
    plain = respond(client, "More", previous_response_id=first["id"])
    assert text_of(plain) == text_of(respond(client, messages_of("Hello", text_of(first), "More")))
    new = respond(client, "More", previous_response_id=first["id"], instructions="Be long.")
    sent = [{"role": "system", "content": "Be long."}, *messages_of("Hello", text_of(first), "More")]
    assert text_of(new) == text_of(respond(client, sent))
    assert plain["instructions"] is None


def test_a_streamed_response_is_stored_too(client):
    first = streamed(client, "Hello")[-1]["response"]
    assert client.get(f"{PATH}/{first['id']}").json() == first
    events = streamed(client, "More", previous_response_id=first["id"])
    assert text_of(events[-1]["response"]) == text_of(respond(client, messages_of("Hello", text_of(first), "More")))


def test_a_stored_response_is_shown_as_it_was(client):
    document = respond(client, metadata={"a": "b"})
    response = client.get(f"{PATH}/{document['id']}")
    assert response.status_code == 200 and checked_response(response.json()) == document and document["store"] is True
    error = error_of(client.get(f"{PATH}/{document['id']}?stream=true"))
    assert error["param"] == "stream"


def test_a_deleted_response_is_gone(client):
    document = respond(client)
    response = client.delete(f"{PATH}/{document['id']}")
    assert response.json() == {"id": document["id"], "object": "response", "deleted": True}
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items")):
        response = client.request(method, f"{PATH}/{document['id']}{path}")
        assert response.status_code == 404 and document["id"] in error_of(response)["message"]
    missing(client, previous_response_id=document["id"])


def test_a_response_that_is_not_to_be_stored_is_not():
    with running() as client:
        for document in (respond(client, store=False), streamed(client, store=False)[-1]["response"]):
            assert document["store"] is False
            assert client.get(f"{PATH}/{document['id']}").status_code == 404
            missing(client, previous_response_id=document["id"])
        assert client.get("/v1/status").json()["responses"] == {"stored": 0, "bytes": 0}


def test_a_response_that_is_not_stored_may_go_on_from_one_that_is(client):
    first = respond(client)
    second = respond(client, "More", previous_response_id=first["id"], store=False)
    assert text_of(second) == text_of(respond(client, messages_of("Hello", text_of(first), "More")))


def test_another_key_finds_nothing():
    with running(keys=KEYS) as client:
        client.headers["authorization"] = f"Bearer {KEYS['alice']}"
        document = respond(client)
        client.headers["authorization"] = f"Bearer {KEYS['bob']}"
        theirs = missing(client, previous_response_id=document["id"])["message"].replace(document["id"], "ID")
        assert theirs == missing(client, previous_response_id="resp_none")["message"].replace("resp_none", "ID")
        for method in ("GET", "DELETE"):
            assert client.request(method, f"{PATH}/{document['id']}").status_code == 404
        reference = [{"type": "item_reference", "id": document["output"][0]["id"]}, {"role": "user", "content": "a"}]
        assert respond(client, reference, 404)["code"] == "item_not_found"
        assert client.get("/v1/status").json()["responses"]["stored"] == 0
        client.headers["authorization"] = f"Bearer {KEYS['alice']}"
        assert client.get(f"{PATH}/{document['id']}").json() == document
        assert client.get("/v1/status").json()["responses"]["stored"] == 1


def test_beyond_the_bytes_the_oldest_responses_go():
    with running(settings=ServerSettings(most_response_bytes=12_000)) as client:
        documents = [respond(client, "x" * 300) for _ in range(12)]
        kept = [client.get(f"{PATH}/{document['id']}").status_code == 200 for document in documents]
        assert kept == sorted(kept) and not kept[0] and kept[-1]
        size = client.get("/v1/status").json()["responses"]["bytes"]
        assert size <= 12_000 and f"specache_stored_response_bytes {float(size)}" in client.get("/metrics").text
        missing(client, previous_response_id=documents[0]["id"])


def test_a_response_that_finds_no_room_says_that_it_is_not_stored():
    with running(settings=ServerSettings(most_response_bytes=3000)) as client:
        assert respond(client)["store"] is True
        large = {"metadata": {"note": "x" * 500, "other": "x" * 500}}
        for document in (respond(client, **large), streamed(client, **large)[-1]["response"]):
            assert document["store"] is False and client.get(f"{PATH}/{document['id']}").status_code == 404


def test_responses_are_forgotten_at_their_age_without_a_request():
    with running(settings=ServerSettings(response_age_seconds=0.2)) as client:
        document = respond(client)
        store = client.app.state.responses
        wait_until(lambda: not store.used_bytes, 20)
        missing(client, previous_response_id=document["id"])


def test_the_items_of_a_response_are_listed(client):
    first = respond(client, [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    second = respond(client, "More", previous_response_id=first["id"])
    path = f"{PATH}/{second['id']}/input_items"
    newest_first = client.get(path).json()
    assert newest_first["object"] == "list" and newest_first["has_more"] is False
    items = [checked_item(item) for item in newest_first["data"]]
    texts = [item["content"][0]["text"] for item in items]
    assert texts == ["More", text_of(first), "Hello", "Be brief."]
    assert [item["role"] for item in items] == ["user", "assistant", "user", "developer"]
    assert (newest_first["first_id"], newest_first["last_id"]) == (items[0]["id"], items[-1]["id"])
    assert client.get(path, params={"order": "asc"}).json()["data"] == items[::-1]
    page = client.get(path, params={"limit": 2, "after": items[0]["id"]}).json()
    assert page["data"] == items[1:3] and page["has_more"] is True
    rest = client.get(path, params={"after": page["last_id"]}).json()
    assert rest["data"] == items[3:] and rest["has_more"] is False


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "101"}, "limit"),
        ({"limit": "²"}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "x"}, "after"),
    ],
)
def test_a_wrong_query_is_refused_by_its_name(client, query, param):
    document = respond(client)
    response = client.get(f"{PATH}/{document['id']}/input_items", params=query)
    assert response.status_code == 400 and error_of(response)["param"] == param


def test_an_item_may_be_referred_to(client):
    first = respond(client, "Hello")
    listed = client.get(f"{PATH}/{first['id']}/input_items").json()["data"][0]
    references = [{"type": "item_reference", "id": one["id"]} for one in (listed, first["output"][0])]
    items = [*references, {"role": "user", "content": "More"}]
    assert text_of(respond(client, items)) == text_of(respond(client, "More", previous_response_id=first["id"]))


def test_items_of_answers_may_be_sent_back_as_they_came(client):
    first = respond(client, "Hello", store=False)
    items = [{"role": "user", "content": "Hello"}, *first["output"], {"role": "user", "content": "More"}]
    assert text_of(respond(client, items)) == text_of(respond(client, messages_of("Hello", text_of(first), "More")))


def test_a_conversation_that_is_too_long_loses_its_oldest_turns_if_asked():
    with running() as client:
        turns = [one for number in range(30) for one in messages_of(f"Question {number}: " + "so " * 5, f"Answer {number}.")]
        items = [{"role": "system", "content": "Count."}, *turns, {"role": "user", "content": "Go on"}]
        error = respond(client, items, 400)
        assert error["code"] == "context_length_exceeded" and error["param"] == "input"
        document = respond(client, items, truncation="auto")
        expected = respond(client, [items[0], *items[-23:]])  # eleven turns
        assert (
            512 - len("<user>" + turns[0]["content"] + "<end><assistant>Answer 0.<end>") < expected["usage"]["input_tokens"] <= 504
        )
        assert document["usage"]["input_tokens"] == expected["usage"]["input_tokens"]
        assert text_of(document) == text_of(expected)
        assert respond(client, items[-3:], truncation="auto")["usage"]["input_tokens"] < 100
        assert respond(client, "x" * 600, 400, truncation="auto")["code"] == "context_length_exceeded"
        counted = [
            post(client, f"{PATH}/input_tokens", {"input": items, "max_output_tokens": 8, "truncation": one})["input_tokens"]
            for one in ("auto", "disabled")
        ]
        assert counted[0] == document["usage"]["input_tokens"] and counted[1] > 512


def test_a_turn_that_is_left_out_takes_its_calls_and_their_results_along():
    def call(name: str) -> list[dict[str, str]]:
        return [
            {"type": "function_call", "call_id": name, "name": "f", "arguments": "{}"},
            {"role": "user", "content": "in between"},
            {"type": "function_call_output", "call_id": name, "output": "x" * 60},
        ]

    with running() as client:
        turns = [item for number in range(9) for item in [{"role": "user", "content": f"Turn {number}"}, *call(f"call_{number}")]]
        assert respond(client, turns[-12:], 400)["code"] == "context_length_exceeded"  # three of them
        expected = respond(client, turns[-8:])
        document = respond(client, turns, truncation="auto")
        assert document["usage"]["input_tokens"] == expected["usage"]["input_tokens"]
        assert text_of(document) == text_of(expected)
