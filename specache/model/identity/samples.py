"""Samples that stand for a tensor's content, and digests of all of it.

Bits are compared, never values.

- `spread`: elements at equal distances, for checks at every call. All tensors of a device are
  copied to the host at once.
- `runs`: a few runs of adjacent elements, for identities on disk: the same elements can be read
  from a file.
- `content_digest`: all elements; one pass over the tensor's memory, about what one decode step
  reads.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from specache.model.identity.offloaded_weights import FileTensor

SPREAD = 256  # most elements sampled of a tensor
RUNS, RUN = 16, 64  # number of runs, and elements per run
_CHUNK = 1024  # 8-byte words per sum

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by itemsize


def as_bits(tensor: Tensor) -> Tensor:
    """View a strided tensor's elements as integers of the same size, without a copy."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.dtype in _BITS.values() else tensor.view(_BITS[tensor.itemsize])


def spread(tensors: Sequence[Tensor], every_row: Sequence[bool]) -> list[bytes]:
    """Return a sample of every tensor.

    Args:
        every_row: per tensor, True if each row of a table [N, K] must be sampled (embeddings, whose
            rows are edited one by one).
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    parts: list[Tensor] = []
    for index, (tensor, rows) in enumerate(zip(tensors, every_row, strict=True)):
        part = _spread_view(as_bits(tensor), rows)
        parts.append(part)
        groups[part.device, part.dtype].append(index)
    found = [b""] * len(parts)
    for members in groups.values():
        joined = torch.cat([parts[i] for i in members]).cpu().numpy().tobytes()
        start = 0
        for i in members:
            end = start + parts[i].nbytes
            found[i] = joined[start:end]
            start = end
    return found


def _spread_view(bits: Tensor, every_row: bool) -> Tensor:
    """Return about `SPREAD` elements of a tensor [n].

    The step is odd, so that they do not all lie in one column.
    """
    count = bits.numel()
    if count <= SPREAD:
        return bits.reshape(-1)
    step = (count // SPREAD) | 1
    if every_row and bits.dim() == 2 and bits.shape[0] > SPREAD:
        step = bits.shape[1] + 1
    if bits.is_contiguous():
        return bits.view(-1)[::step]
    return bits.take(torch.arange(0, count, step, device=bits.device))


def run_starts(count: int) -> tuple[list[int], int]:
    """Return the first elements and the length of the runs sampled of `count` elements."""
    if count <= RUNS * RUN:
        return [0], count
    return [(count - RUN) * i // (RUNS - 1) for i in range(RUNS)], RUN


def runs(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's `run_starts` runs."""
    bits = as_bits(tensor)
    starts, length = run_starts(bits.numel())
    if len(starts) == 1:
        return bits.reshape(-1).cpu().numpy().tobytes()
    index = torch.tensor(starts, device=bits.device)[:, None] + torch.arange(length, device=bits.device)
    return bits.take(index).cpu().numpy().tobytes()


def content_digest(tensor: Tensor) -> bytes:
    """Return a digest of all elements: sums of chunks of 8 KiB, in order."""
    bits = as_bits(tensor).contiguous().reshape(-1)
    per_word = 8 // bits.itemsize
    words = bits.numel() // (per_word * _CHUNK) * _CHUNK
    rest = bits[words * per_word :]
    digest = hashlib.blake2b(rest.cpu().numpy().tobytes(), digest_size=16)
    if words:
        if bits.storage_offset() % per_word or bits.data_ptr() % 8:
            bits = bits.clone()
        sums = bits[: words * per_word].view(torch.int64).view(-1, _CHUNK).sum(1)
        digest.update(sums.cpu().numpy().tobytes())
    return digest.digest()


def file_runs(file: FileTensor) -> bytes:
    """Return the bytes of the `run_starts` runs of a tensor in a file. Nothing else is read."""
    starts, length = run_starts(math.prod(file.shape))
    return as_bits(file.runs(starts, length)).numpy().tobytes()
