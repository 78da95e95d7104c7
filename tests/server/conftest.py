"""One server for all tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from tests.server.tiny_server import running


@pytest.fixture(scope="session")
def client() -> Iterator[TestClient]:
    with running() as client:
        yield client
