"""Rows read at their addresses are those that PyTorch reads from the tensors."""

from __future__ import annotations

import pytest
import torch

from specache.device.sources import MappedRows, StoredRows

BATCH, HEADS, TOKENS, ROWS = 2, 3, 40, 5
CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [8, 48, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mapped_rows_equal_stored_rows_also_after_they_moved(width, dtype):
    stored = [torch.randn(HEADS, TOKENS, width).to(dtype) for _ in range(BATCH)]
    mapped, plain = MappedRows(stored, CPU), StoredRows(stored)
    addresses = mapped.addresses.data_ptr()
    for _ in range(2):
        positions = torch.randint(-1, TOKENS, (BATCH, HEADS, ROWS))
        assert torch.equal(mapped.gather(positions), plain.gather(positions))
        moved = [torch.randn(HEADS, TOKENS, width).to(dtype) for _ in range(BATCH)]
        mapped.replace(moved)
        plain.replace(moved)
    assert mapped.addresses.data_ptr() == addresses  # a captured graph reads them there
