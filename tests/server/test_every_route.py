"""What holds for every route of the server, read from its registry."""

from __future__ import annotations

import pytest

from specache.server import health, web_page
from specache.server.model_routes import ROUTERS
from specache.server.security import OPEN_TO_ALL
from tests.server.tiny_server import error_of, running

ROUTES = sorted(
    (method, route.path.replace("{name:path}", "tiny"))
    for router in (health.router, web_page.router, *ROUTERS)
    for route in router.routes
    for method in route.methods - {"HEAD"}  # whose errors have no body
)
POSTS = [path for method, path in ROUTES if method == "POST"]
BROKEN = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'{"a": NaN}',
    b'{"no_such_field": 1}',
    b"\xff",
    b"{}",
    b'{"model": {}}',
    b'{"model": "\\ud800"}',
]


@pytest.fixture(scope="module")
def keyed():
    with running(keys={"alice": "a" * 24}) as client:
        yield client


def test_the_registry_is_read():
    assert ("POST", "/v1/chat/completions") in ROUTES and len(POSTS) >= 4


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_route_needs_a_key(keyed, method, path):
    response = keyed.request(method, path, json={} if method == "POST" else None)
    assert response.status_code == (200 if path in OPEN_TO_ALL else 401)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_route_is_for_pages_of_this_server_only(client, method, path):
    response = client.request(method, path, json={} if method == "POST" else None, headers={"origin": "http://evil.example"})
    assert response.status_code == 403
    error_of(response)


@pytest.mark.parametrize("path", POSTS)
def test_a_route_takes_json_only(client, path):
    response = client.post(path, content=b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 415
    error_of(response)


@pytest.mark.parametrize("body", BROKEN)
@pytest.mark.parametrize("path", POSTS)
def test_a_route_refuses_broken_bodies_in_the_same_shape(client, path, body):
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_route_has_no_other_method(client, method, path):
    other = "GET" if method == "POST" else "POST"
    if (other, path) not in ROUTES:
        response = client.request(other, path, json={} if other == "POST" else None)
        assert response.status_code == 405 and method in response.headers["allow"]
        error_of(response)
