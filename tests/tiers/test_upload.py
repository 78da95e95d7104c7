"""Rows in main memory are copied to a device head by head."""

from __future__ import annotations

import pytest
import torch

from specache.tiers import transfer
from specache.tiers.ram import RamTier
from specache.tiers.row_memory import RowMemory
from specache.tiers.transfer import upload
from tests.tiers.tier_rows import random_rows

HEADS, TOKENS, DIM = 3, 300, 8
CPU = torch.device("cpu")


@pytest.fixture(params=[None, 64], ids=["one block", "blocks"])
def tier(request):
    tier = RamTier(False, RowMemory(block_tokens=request.param))
    tier.write(0, 0, *random_rows(HEADS, TOKENS, DIM, torch.bfloat16, seed=1))
    return tier


@pytest.mark.parametrize(("start", "stop"), [(0, TOKENS), (5, 40), (64, 128), (100, 101), (7, 7)])
def test_what_arrives_is_what_was_read(tier, start, stop):
    keys, values = tier.read(0, start, stop)
    for found, expected in zip(upload(keys, values, CPU), (keys, values), strict=True):
        assert torch.equal(found, expected)
        assert found.stride(-1) == 1


def test_every_copy_is_of_one_contiguous_head(tier, monkeypatch):
    """Only such copies are queued from page-locked memory; others first gather on the host."""
    copies = []
    copy = torch.Tensor.copy_

    def watched(into, source, non_blocking=False):
        copies.append((source.is_contiguous(), into.is_contiguous(), non_blocking))
        return copy(into, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", watched)
    upload(*tier.read(0, 10, 60), CPU)
    assert copies == [(True, True, True)] * HEADS


def test_keys_and_values_that_are_no_halves_are_copied_as_they_are():
    keys, values = torch.randn(2, 2, 5, 4).unbind(0)
    assert transfer._joined(keys, values) is None
    assert transfer._joined(*(x.transpose(1, 2) for x in (keys, values))) is None
    found = upload(keys, values, CPU)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)
