"""A tiny model, made once per file."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny import llama


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()
