"""A program in a container learns that PyTorch has more threads than the container lets run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

import specache
from specache.platform import machine
from specache.platform.step_threads import warn_of_cpu_limit
from tests.tiny import llama


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch has two threads, and nothing was warned of yet."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    warn_of_cpu_limit.cache_clear()
    yield
    torch.set_num_threads(before)
    warn_of_cpu_limit.cache_clear()


def made() -> list[str]:
    """Make two caches, and return what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            specache.SpeCache(llama()).close()
    return [str(one.message) for one in caught if "threads" in str(one.message)]


@pytest.mark.parametrize(("quota", "threads"), [(0.5, 1), (1.9, 1)])
def test_a_cache_in_a_container_says_how_many_threads_to_set(monkeypatch, quota, threads):
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    (message,) = made()
    assert f"with 2 threads, and a container's limit gives this process the time of {quota:g} cores" in message
    assert f"torch.set_num_threads({threads})" in message


@pytest.mark.parametrize("quota", [None, 2.0, 64.0])
def test_without_such_a_limit_nothing_is_said(monkeypatch, quota):
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert not made()


@pytest.mark.parametrize("chosen", ["environment", "call"])
def test_whoever_chose_a_number_hears_nothing(monkeypatch, chosen):
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    if chosen == "environment":
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    else:
        torch.set_num_threads(1)
    assert not made()
