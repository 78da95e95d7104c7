"""Models that real servers serve, saved once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.real_server import save_long_model


@pytest.fixture(scope="session")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model that takes 16,000 tokens."""
    folder = tmp_path_factory.mktemp("long-model")
    save_long_model(folder)
    return folder
