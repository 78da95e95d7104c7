"""Tiers with known rows, and access to their internals."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from specache.tiers.base import SlowTier
from specache.tiers.disk.disk_tier import DiskTier


def random_rows(heads: int, tokens: int, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the keys and values [Hkv, n, D]."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(heads, tokens, dim, generator=generator).to(dtype) for _ in range(2))
    return keys, values


def fill(tier: SlowTier, tokens: int, *, layer: int = 0, heads: int = 2, dim: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Write random bfloat16 rows and return them."""
    keys, values = random_rows(heads, tokens, dim, torch.bfloat16, seed)
    tier.write(layer, 0, keys, values)
    return keys, values


def row_file(tier: DiskTier, layer: int = 0) -> Path:
    """Return the file that the tier appends a layer to."""
    return tier._files._own[layer].path


def everything(tier: SlowTier, layer: int, heads: int, tokens: int) -> Tensor:
    """Return all rows [Hkv, n, 2 D] by `read`."""
    return torch.cat(tier.read(layer, 0, tokens), dim=-1)


def pairs(heads: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return every head with every position, as `gather` takes them."""
    return torch.arange(heads).repeat_interleave(len(positions)), positions.repeat(heads)


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Check that the block leaves no additional thread, file descriptor or file in `folder`."""
    gc.collect()  # collect earlier tests' garbage now, and not in between
    before = _held(folder)
    yield
    for now, then in zip(_held(folder), before, strict=True):
        assert now == then


def _held(folder: Path) -> tuple[list[str], list[str], list[Path]]:
    files = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own descriptor
            files.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(files), sorted(thread.name for thread in threading.enumerate()), sorted(folder.rglob("*"))
