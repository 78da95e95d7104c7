"""The hot set in C++: the slots, victims and rows of the one on PyTorch operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specache.errors import FastMemoryError
from specache.kernels import dispatch
from specache.kernels.cpu import native
from specache.platform.budget import ByteBudget
from specache.rows.hot_set import HotSet, Lookup, slot_bytes
from specache.rows.native_hot_set import NativeHotSet, new_hot_set

pytestmark = pytest.mark.skipif(native.IMPORT_ERROR is not None, reason="the C++ extension is not built")

HEADS, DIM, TOKENS = 2, 3, 14
CPU = torch.device("cpu")
OPERATIONS = ("advance", "find", "look_up", "missing", "insert", "forget", "forget_ahead", "grow", "clear", "free")


def row_of(head: int, position: int) -> list[float]:
    return [head * 100.0 + position + 0.25 * i for i in range(2 * DIM)]


def rows_of(heads: Tensor, tokens: Tensor) -> Tensor:
    return torch.tensor([row_of(*pair) for pair in zip(heads.tolist(), tokens.tolist(), strict=True)]).view(-1, 2 * DIM)


@st.composite
def selections(draw: st.DrawFn, queries: int, most: int = 5) -> Tensor:
    """Draw ascending positions [Hkv, n, k], some -1 at the end."""
    k = draw(st.integers(0, most))
    lists = [draw(st.sets(st.integers(0, TOKENS - 1), max_size=k)) for _ in range(HEADS * queries)]
    padded = [sorted(one) + [-1] * (k - len(one)) for one in lists]
    return torch.tensor(padded, dtype=torch.int64).view(HEADS, queries, k)


def same_lookup(a: Lookup, b: Lookup) -> None:
    assert (a.selected, a.ready, a.fits) == (b.selected, b.ready, b.fits)
    for name in ("positions", "slots"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("positions", "heads", "tokens"):
        assert torch.equal(getattr(a.missing, name), getattr(b.missing, name)), name


def same_slots(a: HotSet, b: HotSet) -> None:
    assert a.step == b.step and a.capacity == b.capacity
    for name in ("position", "stamp", "kv_rows"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@settings(deadline=None, max_examples=150)
@given(data=st.data(), capacity=st.integers(0, 9))
def test_any_operations_leave_the_same_slots_positions_and_rows(data, capacity):
    both = [cls(HEADS, capacity, 2 * DIM, torch.float32, CPU) for cls in (HotSet, NativeHotSet)]
    oracle, ours = both
    for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), max_size=25)):
        if operation == "find":
            positions = data.draw(selections(1))[:, 0]
            assert torch.equal(oracle.find(positions), ours.find(positions))
        elif operation == "look_up":
            queries = data.draw(st.integers(1, 2))
            positions, real = data.draw(selections(queries)), data.draw(st.integers(0, 1))
            found = [hot.look_up(positions, real) for hot in both]
            same_lookup(*found)
            kv_rows = rows_of(found[0].missing.heads, found[0].missing.tokens)
            come = data.draw(st.booleans())
            for hot in both:
                hot.fill(kv_rows) if come else hot.forget()
            slots = found[0].slots.flatten(1)
            if come:
                assert torch.equal(oracle.rows_at(slots), ours.rows_at(slots))
        elif operation == "missing":
            positions = data.draw(selections(1))[:, 0]
            a, b = (hot.missing(positions) for hot in both)
            assert torch.equal(a.positions, b.positions) and torch.equal(a.tokens, b.tokens) and torch.equal(a.heads, b.heads)
        elif operation == "insert":
            missing = oracle.missing(data.draw(selections(1))[:, 0])
            ours.missing(missing.positions)
            ours.stamp.copy_(oracle.stamp)  # those that are there were not looked up
            for hot in both:
                hot.insert(missing.positions, rows_of(missing.heads, missing.tokens))
        elif operation == "grow":
            more = data.draw(st.integers(0, 4))
            for hot in both:
                hot.grow(hot.capacity + more)
        else:
            for hot in both:
                getattr(hot, operation)()
        same_slots(*both)


def test_the_budget_bounds_the_slots_in_cpp_too():
    budget = ByteBudget(10 * slot_bytes(HEADS, DIM, 4))
    hot = NativeHotSet(HEADS, 0, 2 * DIM, torch.float32, CPU, budget)
    hot.grow(4)
    assert budget.used == 4 * slot_bytes(HEADS, DIM, 4)
    positions = torch.tensor([[1, 2, 3]] * HEADS)
    hot.insert(positions, torch.ones(6, 2 * DIM))
    with pytest.raises(FastMemoryError):
        hot.grow(7)  # old and new slots are in memory at once
    assert (hot.find(positions) >= 0).all()
    hot.grow_if_allowed(7)
    assert hot.capacity == 6
    assert (hot.rows_at(hot.find(positions)) == 1).all()
    hot.free()
    assert budget.used == 0 and hot.capacity == 0
    assert (hot.find(positions) == -1).all()


def test_rows_that_were_not_reserved_are_refused():
    hot = NativeHotSet(HEADS, 4, 2 * DIM, torch.float32, CPU)
    hot.reserve(torch.tensor([[1], [2]]))
    with pytest.raises(ValueError, match="reserved"):
        hot.fill(torch.ones(1, 2 * DIM))


def test_pytorchs_kernels_take_pytorchs_hot_set():
    with dispatch.using("torch"):
        assert type(new_hot_set(HEADS, 2 * DIM, torch.float32, CPU)) is HotSet
    assert type(new_hot_set(HEADS, 2 * DIM, torch.float32, CPU)) is NativeHotSet
