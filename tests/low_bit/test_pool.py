"""Pages go back to their pool when what held them is gone, closed or not."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import specache
from specache.config import Code
from specache.low_bit.layout import PageLayout
from specache.low_bit.pool import SLAB_BYTES, PagePool, PageTable
from specache.platform.budget import ByteBudget
from tests.cache.test_invariants import settings
from tests.tiny import llama, prompt


@pytest.fixture
def pool() -> PagePool:
    return PagePool(PageLayout(Code.ROTATED, 2, 16, 2, 16), torch.device("cpu"), ByteBudget())


def test_a_forgotten_table_gives_its_pages_back(pool):
    table = PageTable(pool)
    table.extend(100)
    fork = table.fork()
    fork.extend(200)
    assert pool.pages_in_use == 6  # of the two that are shared, the partly filled one was copied
    del fork
    assert pool.pages_in_use == 2
    del table
    assert (pool.pages_in_use, pool.budget.used) == (0, 0)


def test_a_table_may_be_forgotten_in_the_middle_of_a_change(pool, monkeypatch):
    """The garbage collector runs when it likes."""
    kept, forgotten = PageTable(pool), [PageTable(pool)]
    in_a_slab = SLAB_BYTES // pool.layout.page_bytes
    kept.extend(64)
    forgotten[0].extend(640)
    add_slab = PagePool._add_slab

    def collected_meanwhile(self: PagePool, pages: int) -> None:
        forgotten.clear()
        assert pool.pages_in_use == 11  # it waits
        add_slab(self, pages)

    monkeypatch.setattr(PagePool, "_add_slab", collected_meanwhile)
    kept.extend(64 * in_a_slab)
    assert pool.pages_in_use == 1 + in_a_slab
    assert pool.budget.used == (1 + in_a_slab) * pool.layout.page_bytes


@pytest.mark.parametrize("changes", [{}, {"bits": 4}])
def test_a_cache_that_was_never_closed_holds_nothing_when_it_is_gone(changes: dict[str, Any]):
    model = llama()
    with specache.SpeCache(model, settings(slow_tier="ram")) as cache:
        specache.prefill(model, prompt(200), cache=cache)
        before = cache.resources.budget.used
        fork = cache.fork(**changes)
        specache.prefill(model, torch.cat([prompt(200), prompt(200, 1)], dim=1), cache=fork)
        assert cache.resources.budget.used > before
        del fork
        gc.collect()
        assert cache.resources.budget.used == before
