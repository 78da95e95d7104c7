"""Measure the readers on a folder's file system, once per process, and choose the fastest."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specache.tiers.disk import aligned_io, readers
from specache.tiers.disk.aligned_io import AlignedBuffer
from specache.tiers.disk.readers import ReadBatch, Reader, ReadFailedError
from specache.tiers.disk.row_layout import BLOCK_ALIGNMENT
from specache.tiers.disk.row_reads import READ_BYTES
from specache.tiers.disk.scratch import PROBE_PREFIX

Kind = tuple[str, bool, int]  # reader, direct, alignment

PROBE_BYTES = 8 << 20
_READ = 4096
_RANDOM_READS = 64
_LARGE_READ = 256 << 10
_BATCH_BYTES = READ_BYTES  # bytes of a batch of large reads: no more memory than reading rows takes, which a budget counts
_ROUNDS = 2  # the faster round counts: another program may have interfered


@dataclass(frozen=True)
class ReaderReport:
    """The reader chosen for a folder, and its measurements.

    Attributes:
        direct: reads and writes bypass the page cache.
        alignment: bytes that direct reads are widened to.
        bytes_per_s: throughput of large parallel reads; None if it could not be measured (the disk
            is full).
        latency_s: time of one random 4 KiB read, likewise.
    """

    reader: str
    direct: bool
    alignment: int
    bytes_per_s: float | None = None
    latency_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def lease(self) -> Reader:
        """Lease the reader; return it with `readers.release`.

        Fall back to threads if it is not available now.
        """
        with contextlib.suppress(OSError):
            return readers.lease(self.reader, self.direct, self.alignment)
        return readers.lease("threads", self.direct, self.alignment)


_known: dict[int, ReaderReport] = {}  # by device number


def report_for(folder: Path) -> ReaderReport:
    """Return the report of the folder's file system, measured on first use."""
    device = folder.stat().st_dev
    if device in _known:
        return _known[device]
    report = probe(folder)
    if report.bytes_per_s is not None:
        _known[device] = report
    return report


def probe(folder: Path) -> ReaderReport:
    """Measure the readers on a temporary file of 8 MiB in `folder` (a tenth of a second on an SSD).

    Raises:
        OSError: no file can be created there.
    """
    path = folder / f"{PROBE_PREFIX}{secrets.token_hex(8)}"
    os.close(aligned_io.open_file(str(path), create=True, direct=False))
    try:
        alignment = _direct_alignment(path)
        fallback = ReaderReport("threads", bool(alignment), alignment or _READ)
        try:
            _fill(path)
        except OSError:
            return fallback
        with contextlib.suppress(OSError, ReadFailedError):
            return _fastest(path, alignment)
        return fallback
    finally:
        path.unlink()


def _direct_alignment(path: Path) -> int:
    """Return the alignment that direct I/O of our blocks needs; 0 if unsupported or unsuitable."""
    try:
        fd = aligned_io.open_file(str(path), create=False, direct=True)
    except OSError:
        return 0
    try:
        reported = aligned_io.direct_alignment(fd)
        alignment = aligned_io.DEFAULT_ALIGNMENT if reported is None else reported
        if alignment == 0 or alignment > BLOCK_ALIGNMENT:
            return 0
        buffer = AlignedBuffer(BLOCK_ALIGNMENT)
        aligned_io.write_all(fd, buffer.bytes, 0)
        aligned_io.read_at(fd, buffer.bytes[:alignment], alignment % BLOCK_ALIGNMENT)
        return alignment
    except OSError as error:
        return 0 if error.errno == errno.EINVAL else alignment  # a full disk says nothing about direct I/O
    finally:
        os.close(fd)


def _fill(path: Path) -> None:
    with _opened(path, direct=False) as fd:
        for offset in range(0, PROBE_BYTES, _LARGE_READ):
            aligned_io.write_all(fd, memoryview(os.urandom(_LARGE_READ)), offset)
        os.fdatasync(fd)


def _fastest(path: Path, alignment: int) -> ReaderReport:
    """Measure the readers and return the one that completes a batch of random reads first."""
    kinds: list[Kind] = [("threads", bool(alignment), alignment or _READ), ("buffered", False, _READ)]
    if alignment:
        kinds.insert(0, ("io_uring", True, alignment))
    times = {}
    for kind in kinds:
        with contextlib.suppress(OSError):  # no io_uring here
            times[kind] = _measured(path, kind, _random_reads)
    best = min(times, key=lambda kind: times[kind])
    large, single = (_measured(path, best, batches) for batches in (_large_reads, _one_read))
    return ReaderReport(*best, bytes_per_s=_BATCH_BYTES / large, latency_s=single)


def _measured(path: Path, kind: Kind, make: Callable[[int, AlignedBuffer], list[ReadBatch]]) -> float:
    """Return the seconds per batch of `make`, with none of the file in the page cache."""
    name, direct, alignment = kind
    reader = readers.READERS[name](direct, alignment)
    buffer = AlignedBuffer(_BATCH_BYTES)
    best = float("inf")
    try:
        with _opened(path, direct) as fd:
            batches = make(fd, buffer)
            for _ in range(_ROUNDS):
                aligned_io.drop_cached(fd)
                started = time.perf_counter()
                for batch in batches:
                    reader.read(batch)
                best = min(best, (time.perf_counter() - started) / len(batches))
    finally:
        reader.close()
    return best


def _random_reads(fd: int, buffer: AlignedBuffer) -> list[ReadBatch]:
    """Return one batch, spread over the file in an order that read-ahead does not predict."""
    number = np.arange(_RANDOM_READS)
    offsets = number * 1237 % (PROBE_BYTES // _READ) * _READ
    return [ReadBatch(buffer, np.full_like(number, fd), offsets, number * _READ, np.full_like(number, _READ))]


def _one_read(fd: int, buffer: AlignedBuffer) -> list[ReadBatch]:
    """Return the same reads as batches of one."""
    batch = _random_reads(fd, buffer)[0]
    parts = (slice(i, i + 1) for i in range(len(batch)))
    return [ReadBatch(buffer, batch.fds[p], batch.offsets[p], batch.starts[p], batch.lengths[p]) for p in parts]


def _large_reads(fd: int, buffer: AlignedBuffer) -> list[ReadBatch]:
    """Return batches that cover the whole file."""
    offsets = range(0, PROBE_BYTES, _BATCH_BYTES)
    wholes = (ReadBatch(buffer, *(np.array([value]) for value in (fd, offset, 0, _BATCH_BYTES))) for offset in offsets)
    return [whole.split(_LARGE_READ) for whole in wholes]


@contextlib.contextmanager
def _opened(path: Path, direct: bool) -> Iterator[int]:
    fd = aligned_io.open_file(str(path), create=False, direct=direct)
    try:
        yield fd
    finally:
        os.close(fd)
