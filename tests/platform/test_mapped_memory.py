"""Tensors that lie behind one another, each with a memory of its own all the same."""

from __future__ import annotations

import copy
import io
import mmap
import weakref

import pytest
import torch

from specache.platform import mapped_memory
from specache.platform.mapped_memory import ALIGNMENT, CHUNK, Arena

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="no anonymous mappings here")


def test_tensors_lie_in_order_and_are_zero():
    arena = Arena()
    first, second, third = arena.empty((3, 5), torch.int8), arena.empty((7,), torch.int16), arena.empty((2, 2), torch.float32)
    assert (first.shape, second.shape, third.shape) == ((3, 5), (7,), (2, 2))
    assert all(not each.any() for each in (first, second, third))
    assert second.data_ptr() - first.data_ptr() == third.data_ptr() - second.data_ptr() == ALIGNMENT
    assert first.data_ptr() % ALIGNMENT == 0


def test_each_has_a_storage_and_a_version_of_its_own():
    first, second = (arena.empty((4,), torch.int8) for arena in [Arena()] for _ in range(2))
    before = second._version
    first.fill_(3)
    assert not second.any() and second._version == before
    assert first.untyped_storage().nbytes() == 4 and first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    twin = copy.deepcopy(first)
    assert torch.equal(twin, first) and twin.untyped_storage().nbytes() == 4
    file = io.BytesIO()
    torch.save({"first": first, "second": second}, file)
    assert len(file.getvalue()) < 10_000
    file.seek(0)
    assert torch.equal(torch.load(file)["first"], first)


def test_what_does_not_fit_gets_a_chunk_of_its_own():
    arena = Arena()
    small, large, next_one = arena.empty((10,), torch.int8), arena.empty((CHUNK + 1,), torch.int8), arena.empty((10,), torch.int8)
    large[-1] = 1
    assert not small.any() and not next_one.any() and large.sum() == 1


def test_an_empty_tensor_needs_no_memory():
    assert Arena().empty((0, 4), torch.int8).shape == (0, 4)


def test_a_chunk_is_freed_with_the_last_tensor_and_not_before(monkeypatch):
    class Mapping(mmap.mmap):
        """A mapping that can be watched."""

    monkeypatch.setattr(mapped_memory.mmap, "mmap", Mapping)
    arena = Arena()
    first, second = arena.empty((8,), torch.int8), arena.empty((8,), torch.int8)
    mapping = weakref.ref(arena._mapping)
    del arena, first
    second.fill_(5)
    assert mapping() is not None and second.sum() == 40
    del second
    assert mapping() is None


def test_a_system_without_huge_pages_has_an_arena_too(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not Arena().empty((100,), torch.float32).any()
    monkeypatch.delattr(mmap, "MAP_ANONYMOUS")
    assert not Arena().empty((100,), torch.float32).any()
