"""Tiers with known rows, and access to their internals."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections import Counter
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
    """Check that the block leaves no additional thread, file descriptor or file in `folder`.

    Threads that earlier tests let go may end meanwhile, and close their descriptors.
    """
    gc.collect()  # collect earlier tests' garbage now, and not in between
    descriptors, threads, files = _descriptors(), threading.enumerate(), sorted(folder.rglob("*"))
    yield
    assert not _descriptors() - descriptors
    assert not [thread.name for thread in threading.enumerate() if thread not in threads]
    assert sorted(folder.rglob("*")) == files


def _descriptors() -> Counter[str]:
    """Return what the process's descriptors lead to, and how many lead there."""
    found: Counter[str] = Counter()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own descriptor
            found[os.readlink(f"/proc/self/fd/{descriptor}")] += 1
    return found


class SecondsPerLook:
    """A clock in the place of the module `time`: each look at it is a second after the last one."""

    def __init__(self) -> None:
        self._looks = itertools.count()

    def perf_counter(self) -> float:
        return float(next(self._looks))
