"""`/health`, `/metrics` and `/v1/status`, from loading to the end."""

from __future__ import annotations

import dataclasses

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from specache.engine.prefix_status import PrefixCounters, PrefixStatus
from specache.engine.prefix_store import PrefixStore
from specache.engine.service import EngineService
from specache.server.app import ServerApp
from specache.server.service_numbers import flat_numbers, service_numbers
from specache.server.settings import ServerSettings
from tests.server.tiny_server import ADDRESS, SHORT, chat, error_of, printable_model, running, served_model


def samples(client) -> dict[str, float]:
    """The metrics without labels, by name."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def test_a_server_says_503_until_its_model_is_there():
    app = ServerApp(ServerSettings())
    with TestClient(app, base_url=ADDRESS) as client:
        response = client.get("/health")
        assert response.status_code == 503 and response.json() == {"status": "loading"}
        assert client.head("/health").status_code == 503
        assert client.get("/metrics").status_code == client.get("/v1/status").status_code == 200
        for path in ("/v1/models", "/tokenizer_info", "/nothing"):
            response = client.get(path)
            assert response.status_code == 503 and error_of(response)["code"] == "loading"
            assert int(response.headers["retry-after"]) >= 1
        model = printable_model()
        with EngineService(model, SHORT) as service:
            assert service.wait_until_ready(60)
            app.begin_serving(served_model(model), service)
            assert client.get("/health").json() == {"status": "ok"}
            assert client.head("/health").status_code == 200
            assert chat(client, max_tokens=1)


def test_an_engine_that_has_stopped_is_said():
    model = printable_model()
    app = ServerApp(ServerSettings())
    with EngineService(model, SHORT) as service, TestClient(app, base_url=ADDRESS) as client:
        assert service.wait_until_ready(60)
        app.begin_serving(served_model(model), service)
        service.close()
        response = client.get("/health")
        assert response.status_code == 503 and response.json() == {"status": "engine_stopped"}
        assert chat(client, code=503)["code"] == "engine_stopped"


def test_a_full_queue_says_when_to_come_back():
    with running(most_waiting=1) as client:
        service = client.app.state.service

        class Full:
            """The same service, with its queue full."""

            def __getattr__(self, name: str):
                return getattr(service, name)

            def submit(self, job, on_event):
                from specache.errors import QueueFullError

                raise QueueFullError("1 requests wait, the most that may.", 7.2)

        client.app.state.service = Full()
        response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert response.status_code == 429 and response.headers["retry-after"] == "8"
        assert error_of(response)["type"] == "rate_limit_error"
        assert client.app.state.open_streams == 0


def test_what_can_never_fit_is_refused_with_the_numbers():
    config = dataclasses.replace(SHORT, fast_memory=600_000)
    with running(config=config) as client:
        assert chat(client, max_tokens=4)["usage"]["completion_tokens"] == 4
        error = chat(client, "a" * 400, max_tokens=100, n=16, temperature=1, code=400)
        assert error["code"] == "exceeds_fast_memory" and "bytes" in error["message"]


def test_metrics_count_requests_and_tokens():
    with running() as client:
        chat(client, max_tokens=5, n=2)
        found = samples(client)
        assert found["specache_up"] == 1 and found["specache_open_requests"] == 0
        assert found["specache_generated_tokens_total"] == 10 and found["specache_prompt_tokens_total"] == 8
        assert found["specache_time_to_first_token_seconds_count"] == 1
        assert found["specache_time_between_tokens_seconds_count"] == 8
        assert found["specache_engine_running"] == found["specache_engine_waiting"] == 0
        assert 'specache_http_requests_total{route="/v1/chat/completions",status="200"} 1.0' in client.get("/metrics").text


def test_what_only_grows_is_a_counter_and_its_unit_is_in_its_name():
    with running() as client:
        chat(client, max_tokens=5)
        text, found = client.get("/metrics").text, samples(client)
        assert found["specache_engine_finished_total"] == 1 and found["specache_engine_new_tokens_total"] == 5
        assert found["specache_engine_decode_seconds_total"] > 0
        for name in (
            "refused_total",
            "rows_selected_total",
            "bytes_fetched_total",
            "wait_seconds_total",
            "prompt_tokens_read_total",
        ):
            assert f"specache_engine_{name}" in found
        assert "# TYPE specache_engine_finished_total counter" in text
        assert "# TYPE specache_engine_fast_bytes gauge" in text and "# TYPE specache_engine_chunk_tokens gauge" in text


def test_stored_prompts_have_counters_of_their_own():
    config = SHORT
    model = printable_model()
    with running(model, config=config, prefixes=PrefixStore(model, config)) as client:
        chat(client, "b" * 300)
        chat(client, "b" * 300)
        found = samples(client)
        assert found["specache_engine_prefix_hits_total"] == found["specache_engine_prefix_misses_total"] == 1
        assert found["specache_engine_prefix_dropped_total"] == 0
        assert found["specache_engine_prefix_stored"] >= 1


def test_unknown_addresses_are_counted_as_one():
    with running() as client:
        for number in range(3):
            client.get(f"/no/{number}")
        assert 'specache_http_requests_total{route="other",status="404"} 3.0' in client.get("/metrics").text


def test_status_has_numbers_and_the_newest_requests(client):
    chat(client, max_tokens=3)
    status = client.get("/v1/status").json()
    assert status["status"] == "ok" and status["model"] == "tiny" and status["prefixes"] is None
    assert {"waiting", "running", "fast_bytes", "fast_budget_bytes", "slow_bytes", "hit_rate"} <= set(status)
    request = status["requests"][0]
    assert request["new_tokens"] == 3 and request["finish_reasons"] == ["length"] and request["seconds"] > 0
    assert request["fast_bytes"] > 0 and request["ordinary_cache_bytes"] > 0


def test_numbers_of_the_store_are_in_the_status_and_its_texts_are_not():
    @dataclasses.dataclass
    class Status:
        running: int
        first_token_s: float | None
        prefixes: PrefixStatus | None
        error: Exception | None = None

    store = PrefixStatus(prefixes=2, saved=3, ignored={"/a/path": "why"}, problem="/a/path", counters=PrefixCounters(hits=5))
    numbers = service_numbers(Status(1, None, store))
    assert numbers["running"] == 1 and numbers["first_token_s"] is None and "error" not in numbers
    found = numbers["prefixes"]
    assert (found["stored"], found["saved"], found["hits"]) == (2, 3, 5) and "path" not in str(numbers)
    flat = flat_numbers(Status(1, None, store))
    assert flat["prefix_hits"] == 5 and "first_token_s" not in flat and all(isinstance(one, float) for one in flat.values())
    assert service_numbers(Status(1, None, None))["prefixes"] is None
