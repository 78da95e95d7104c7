"""Threads of commands: as PyTorch has them, but no more than a container's limit lets run."""

from __future__ import annotations

import pytest
import torch

from specache.cli import threads
from tests.cli.running import run_json


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """PyTorch has two threads, of which the container lets one run at a time."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_by_default_no_thread_waits_for_the_containers_limit():
    threads.set_threads(None)
    assert torch.get_num_threads() == 1


def test_a_number_that_the_user_names_is_used(monkeypatch):
    threads.set_threads(2)
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads.set_threads(None)
    assert torch.get_num_threads() == 2


def test_doctor_shows_the_threads_that_generate_takes():
    assert run_json("doctor")["cpu"]["threads"] == 1
