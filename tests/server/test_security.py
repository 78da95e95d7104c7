"""Who may ask: hosts, origins, types, keys; and that one key sees nothing of another."""

from __future__ import annotations

import logging

import pytest
from starlette.datastructures import Headers

from specache.errors import ConfigError
from specache.server.error_responses import ApiError
from specache.server.security import check_host, check_origin
from specache.server.settings import ServerSettings
from tests.server.tiny_server import ADDRESS, chat, error_of, post, running

ALICE, BOB = "a" * 24, "b" * 24
BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "temperature": 0}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def keyed():
    with running(keys={"alice": ALICE, "bob": BOB}) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "example.org"])
def test_another_host_needs_keys(host):
    with pytest.raises(ConfigError, match="--api-key-file"):
        ServerSettings(host=host).check_keys(has_keys=False)
    ServerSettings(host=host).check_keys(has_keys=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_the_own_machine_needs_none(host):
    ServerSettings(host=host).check_keys(has_keys=False)


def host_status(name: str, **settings: object) -> int:
    try:
        check_host(Headers({"host": name}), ServerSettings(**settings))
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:9", "LOCALHOST", "[::1]:8000"])
def test_names_of_this_machine_are_known(host):
    assert host_status(host) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.1.4", "localhost.evil.example"]
)
def test_other_names_are_refused(host):
    assert host_status(host) == 403


@pytest.mark.parametrize(
    "host", ["", "a@127.0.0.1", "127.0.0.1/x", "127.0.0.1:x", "127.0.0.1?", "[", "127.0.0.1#", "127.0.0.1:999999"]
)
def test_what_is_no_host_is_refused(host):
    assert host_status(host) in (400, 403)


def test_a_server_for_other_machines_is_asked_by_address_or_by_its_names():
    more = {"host": "0.0.0.0", "allowed_hosts": ("llm.example", "Other.example:8000")}
    assert host_status("other.example:8000", **more) == host_status("other.example", **more) == 200
    assert host_status("192.168.1.4:8000", **more) == host_status("llm.example", **more) == host_status("localhost", **more) == 200
    assert host_status("evil.example", **more) == 403


def test_a_request_without_a_host_or_with_two_is_refused():
    for raw in ([], [(b"host", b"127.0.0.1"), (b"host", b"127.0.0.1")]):
        with pytest.raises(ApiError) as caught:
            check_host(Headers(raw=raw), ServerSettings())
        assert caught.value.status == 400


def test_the_server_refuses_a_foreign_host(client):
    response = client.get("/health", headers={"host": "evil.example"})
    assert response.status_code == 403 and error_of(response)["code"] == "bad_host"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9000", "http://[", "file://"])
def test_pages_of_others_are_refused(client, origin):
    for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("OPTIONS", CHAT)):
        response = client.request(method, path, headers={"origin": origin}, json=BODY if method == "POST" else None)
        assert response.status_code == 403 and error_of(response)["code"] == "foreign_origin"
        assert "access-control-allow-origin" not in response.headers


def test_a_page_of_this_server_may_ask(client):
    assert client.post(CHAT, json=BODY, headers={"origin": ADDRESS}).status_code == 200


def test_a_browser_that_says_cross_site_is_refused_but_may_follow_a_link():
    with pytest.raises(ApiError):
        check_origin(Headers({"host": "127.0.0.1", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}))
    check_origin(Headers({"host": "127.0.0.1", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}))


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json; charset=latin-1"],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize", "/nothing"])
def test_only_json_is_taken(client, kind, path):
    response = client.post(path, content=b"{}", headers={"content-type": kind})
    assert response.status_code == 415 and error_of(response)["code"] == "unsupported_media_type"


def test_json_with_its_charset_is_taken_and_a_compressed_body_is_not(client):
    assert client.post(
        "/tokenize", content=b'{"prompt": "a"}', headers={"content-type": "application/json; charset=UTF-8"}
    ).is_success
    response = client.post("/tokenize", json={}, headers={"content-encoding": "gzip"})
    assert response.status_code == 415


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer"}, bearer("c" * 24), bearer(ALICE[:-1]), {"x-api-key": "nobody"}, {"authorization": ALICE}],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/status", "/nothing", "/tokenizer_info"])
def test_nothing_is_told_without_a_key(keyed, headers, path):
    response = keyed.get(path, headers=headers)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)["code"] == "invalid_api_key"


def test_health_needs_no_key(keyed):
    assert keyed.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("headers", [bearer(ALICE), {"authorization": f"bearer  {ALICE}"}, {"x-api-key": ALICE}])
def test_a_key_comes_as_bearer_or_as_x_api_key(keyed, headers):
    assert keyed.post(CHAT, json=BODY, headers=headers).status_code == 200


def test_a_key_sees_its_own_requests_only(keyed):
    keyed.post(CHAT, json={**BODY, "max_tokens": 3}, headers=bearer(ALICE))
    mine = keyed.get("/v1/status", headers=bearer(ALICE)).json()["requests"]
    assert mine[0]["new_tokens"] == 3
    assert keyed.get("/v1/status", headers=bearer(BOB)).json()["requests"] == []


def test_a_long_body_is_refused_before_and_while_it_comes():
    with running(settings=ServerSettings(most_body_bytes=1000)) as client:
        headers = {"content-type": "application/json"}
        for content in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):
            response = client.post(CHAT, content=content, headers=headers)
            assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"


def test_a_log_line_has_numbers_and_no_text(client, caplog):
    with caplog.at_level(logging.INFO, "specache.server"):
        chat(client, "my secret", max_tokens=2)
        client.get("/v1/models/%0a%1b[31mforged")
        client.get("/" + "x" * 5000)
    lines = [record.getMessage() for record in caplog.records if record.name == "specache.server"]
    assert len(lines) == 3 and all(line.isprintable() and len(line) < 250 for line in lines)
    assert "secret" not in "".join(lines)
    assert lines[0].startswith("POST /v1/chat/completions 200") and "new=2" in lines[0]


def test_an_address_behind_a_proxy_works_with_and_without_its_prefix():
    with running(settings=ServerSettings(root_path="/llm")) as client:
        for path in ("/llm/v1/models", "/v1/models", "/llm/health", "/health"):
            assert client.get(path).status_code == 200
        assert client.get("/other/v1/models").status_code == 404


def test_a_proxys_prefix_needs_no_key_for_health_alone():
    with running(settings=ServerSettings(root_path="/llm"), keys={"alice": ALICE}) as client:
        assert client.get("/llm/health").status_code == 200
        assert client.get("/llm/v1/models").status_code == client.get("/llm/llm/health").status_code == 401


@pytest.mark.parametrize("path", ["llm", "/llm/", "/a b", "//", "/"])
def test_a_root_path_must_be_a_path(path):
    with pytest.raises(ConfigError, match="root_path"):
        ServerSettings(root_path=path)


def test_a_session_is_its_keys_own():
    """Equal names of two keys are two sessions, and a session is not its key's other requests."""
    from specache.server.chat_fields import ChatBody
    from specache.server.generation import JobMaker
    from tests.server.tiny_server import printable_model, served_model

    served = served_model(printable_model())

    def owner(key: str, session: str | None, **settings: bool) -> str:
        body = ChatBody.model_validate({**BODY, "session": session})
        return JobMaker(served, ServerSettings(**settings), key).chat(body)[0].job.owner

    owners = [owner(key, session) for key in ("alice", "bob", "") for session in (None, "report", "other")]
    assert len(set(owners)) == len(owners)
    assert owner("alice", None, share_prefixes=True) == owner("bob", None, share_prefixes=True)


def test_requests_beyond_the_limit_are_told_to_come_back(client):
    with running(settings=ServerSettings(most_streams=1)) as limited:
        state = limited.app.state
        state.open_streams = 1
        response = limited.post(CHAT, json=BODY)
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert error_of(response)["type"] == "rate_limit_error"
        state.open_streams = 0
        assert post(limited, CHAT, BODY)
        assert state.open_streams == 0
