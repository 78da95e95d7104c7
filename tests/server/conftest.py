"""Servers and models that many tests use, made once per run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.server.real_server import save_long_model
from tests.server.tiny_server import running


@pytest.fixture(scope="session")
def client() -> Iterator[TestClient]:
    with running() as client:
        yield client


@pytest.fixture(scope="session")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model that takes 16,000 tokens."""
    folder = tmp_path_factory.mktemp("long-model")
    save_long_model(folder)
    return folder
