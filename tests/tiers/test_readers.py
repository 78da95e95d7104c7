"""Every reader returns the same bytes, continues after short reads, and reports where a file ends
or fails.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specache.tiers.disk import aligned_io, native_reads, probe, readers
from specache.tiers.disk.aligned_io import AlignedBuffer, BufferPool
from specache.tiers.disk.readers import ReadBatch, Reader, ReadFailedError
from tests.tiers.tier_rows import SecondsPerLook, nothing_left

SIZE = 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readers") / "bytes"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@pytest.fixture(params=["io_uring", "threads", "buffered"])
def reader(request: pytest.FixtureRequest, file: Path) -> Iterator[Reader]:
    trial = file.with_name("trial")
    trial.touch()
    alignment = probe._direct_alignment(trial) if request.param != "buffered" else 0
    try:
        made = readers.READERS[request.param](bool(alignment), alignment or 4096)
    except OSError as error:
        pytest.skip(f"no {request.param} here: {error}")
    yield made
    made.close()


def batch(reader: Reader, file: Path, count: int, seed: int = 0) -> tuple[ReadBatch, int]:
    """Return reads of random length anywhere in the file, and its descriptor."""
    random = np.random.default_rng(seed)
    fd = aligned_io.open_file(str(file), create=False, direct=reader.direct)
    unit = 4096
    lengths = random.integers(1, 5, count) * unit
    offsets = random.integers(0, SIZE // unit - 5, count) * unit
    starts = np.cumsum(lengths) - lengths
    return ReadBatch(AlignedBuffer(int(lengths.sum())), np.full(count, fd), offsets, starts, lengths), fd


def check(one: ReadBatch, file: Path) -> None:
    data = file.read_bytes()
    for offset, start, length in zip(one.offsets, one.starts, one.lengths, strict=True):
        assert bytes(one.buffer.bytes[start : start + length]) == data[offset : offset + length]


@pytest.mark.parametrize("count", [1, 2, 7, 500])
def test_a_reader_returns_the_bytes_of_the_file(reader, file, count):
    one, fd = batch(reader, file, count)
    reader.read(one)
    check(one, file)
    os.close(fd)


def test_a_reader_serves_several_threads(reader, file):
    batches = [batch(reader, file, 60, seed) for seed in range(6)]
    threads = [threading.Thread(target=reader.read, args=(one,)) for one, _ in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, fd in batches:
        check(one, file)
        os.close(fd)


def test_a_split_batch_reads_the_same(reader, file):
    one, fd = batch(reader, file, 20)
    parts = one.split(4096)
    assert len(parts) == one.lengths.sum() // 4096
    reader.read(parts)
    check(one, file)
    os.close(fd)


def only_plain_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make io_uring fail, so that every read takes the plain path, which tests can disturb."""
    monkeypatch.setattr(native_reads.NativeRows, "read", lambda *arguments: False)


def test_short_and_interrupted_reads_are_completed(reader, file, monkeypatch):
    only_plain_reads(monkeypatch)
    calls = []

    def short(fds: int, into: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) % 3 == 0:
            raise InterruptedError
        return preadv(fds, [into[0][:4096]] if len(calls) % 2 else [into[0][:1]] if not reader.direct else into, offset)

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", short)
    one, fd = batch(reader, file, 30)
    reader.read(one)
    check(one, file)
    assert len(calls) > len(one)
    os.close(fd)


def test_reading_past_the_end_of_the_file_fails_at_its_offset(reader, tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(bytes(10_000))
    fd = aligned_io.open_file(str(path), create=False, direct=reader.direct)
    lengths = np.array([8192, 4096])
    one = ReadBatch(AlignedBuffer(16_384), np.full(2, fd), np.array([0, 8192]), np.array([0, 8192]), lengths)
    with pytest.raises(ReadFailedError) as raised:
        reader.read(one)
    assert (raised.value.fd, raised.value.reached, raised.value.cause) == (fd, 10_000, None)
    os.close(fd)


def test_a_failing_device_is_an_error_with_its_cause(reader, file, monkeypatch):
    only_plain_reads(monkeypatch)
    one, fd = batch(reader, file, 30)

    def broken(fd: int, into: memoryview, offset: int) -> int:
        if offset == one.offsets[17]:
            raise OSError(errno.EIO, "Input/output error")
        return len(into)

    monkeypatch.setattr(aligned_io, "read_at", broken)
    with pytest.raises(ReadFailedError) as raised:
        reader.read(one)
    assert raised.value.reached == one.offsets[17]
    assert raised.value.cause is not None
    assert raised.value.cause.errno == errno.EIO
    os.close(fd)


def test_no_read_runs_any_more_when_one_has_failed(file, monkeypatch):
    """The memory may be reused then."""
    running, most = [], []

    def slow(fd: int, into: memoryview, offset: int) -> int:
        running.append(offset)
        most.append(len(running))
        if offset == 0:
            running.remove(offset)
            raise OSError(errno.EIO, "Input/output error")
        threading.Event().wait(0.02)
        running.remove(offset)
        return len(into)

    monkeypatch.setattr(aligned_io, "read_at", slow)
    reader = readers.ThreadReader(False, 4096)
    number = np.arange(16)
    one = ReadBatch(AlignedBuffer(65_536), number, number * 4096, number * 4096, np.full(16, 4096))
    with pytest.raises(ReadFailedError):
        reader.read(one)
    assert not running
    assert max(most) > 1
    reader.close()


def test_a_closed_reader_leaves_nothing(file):
    for name in readers.READERS:
        with nothing_left(file.parent):
            try:
                reader = readers.lease(name, False, 4096)
            except OSError:
                continue
            assert readers.lease(name, False, 4096) is reader
            one, fd = batch(reader, file, 50)
            reader.read(one)
            readers.release(reader)
            check(one, file)
            reader.read(one)  # the other user's reader still works
            readers.release(reader)
            os.close(fd)


def test_buffers_are_reused_and_their_number_is_bounded():
    pool = BufferPool()
    with pool.borrow(10_000) as first, pool.borrow(10_000) as second:
        assert first is not second
        assert first.address % 4096 == second.address % 4096 == 0
    with pool.borrow(10_000) as third:
        assert third in (first, second)
    for size in range(1, 40):
        with pool.borrow(size << 16):
            pass
    assert pool.nbytes <= 2 * (39 << 16)  # as many as were borrowed at once


# The probe


def test_the_probe_measures_and_leaves_nothing(tmp_path, monkeypatch):
    """By a clock that counts a second for the whole file, and one for all small reads."""
    monkeypatch.setattr(probe, "time", SecondsPerLook())
    with nothing_left(tmp_path):
        report = probe.probe(tmp_path)
    assert report.reader in readers.READERS
    assert report.bytes_per_s == probe.PROBE_BYTES
    assert report.latency_s == 1 / probe._RANDOM_READS
    assert report.alignment in (512, 4096)


def test_the_probe_takes_the_fastest_reader(tmp_path, monkeypatch):
    for fastest in ("io_uring", "threads", "buffered"):
        monkeypatch.setattr(probe, "_measured", lambda path, kind, make, fastest=fastest: 1.0 + (kind[0] != fastest))
        if fastest != "io_uring" or probe.probe(tmp_path).direct:
            assert probe.probe(tmp_path).reader == fastest


def test_where_io_uring_is_forbidden_another_reader_is_taken(tmp_path, monkeypatch):
    def forbidden(self: native_reads.NativeRows, entries: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(native_reads.NativeRows, "__init__", forbidden)
    assert probe.probe(tmp_path).reader in ("threads", "buffered")


def test_a_file_system_without_direct_io_is_used_without(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    report = probe.probe(tmp_path)
    assert not report.direct
    assert report.reader in ("threads", "buffered")


def test_a_full_disk_can_be_probed(tmp_path, monkeypatch):
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "trial").touch()
    alignment = probe._direct_alignment(tmp_path / "trial")
    monkeypatch.setattr(aligned_io, "write_at", full)
    with nothing_left(tmp_path):
        report = probe.probe(tmp_path)
    assert (report.bytes_per_s, report.latency_s) == (None, None)
    assert report.direct == bool(alignment)


def ring_reader() -> readers.RingReader:
    try:
        return readers.RingReader(False, 4096)
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")


def test_a_ring_that_accepts_no_reads_is_replaced_by_plain_reads(file, monkeypatch):
    reader = ring_reader()
    one, fd = batch(reader, file, 20)
    with monkeypatch.context() as patch:
        patch.setattr(native_reads.NativeRows, "read", lambda *arguments: False)
        reader.read(one)
    check(one, file)
    monkeypatch.setattr(aligned_io, "read_at", None)  # the ring reads everything itself again
    two, other = batch(reader, file, 300, seed=1)
    reader.read(two)
    check(two, file)
    check(one, file)
    reader.close()
    os.close(fd)
    os.close(other)


def test_a_read_that_fails_in_the_ring_is_reported_by_the_plain_one(file):
    reader = ring_reader()
    one, fd = batch(reader, file, 20)
    os.close(fd)
    with pytest.raises(readers.ReadFailedError) as raised:
        reader.read(one)
    assert isinstance(raised.value.cause, OSError) and raised.value.cause.errno == errno.EBADF
    reader.close()


def test_ctrl_c_while_other_threads_read_waits_for_them(file, monkeypatch):
    waits, wait = [], readers.wait

    def interrupted(futures: list[Any]) -> Any:
        waits.append(futures)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return wait(futures)

    def slow(fd: int, into: memoryview, offset: int) -> int:
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait(0.05)
        return os.preadv(fd, [into], offset)

    monkeypatch.setattr(readers, "wait", interrupted)
    monkeypatch.setattr(aligned_io, "read_at", slow)
    reader = readers.ThreadReader(False, 4096)
    one, fd = batch(reader, file, 16)
    with pytest.raises(KeyboardInterrupt):
        reader.read(one)
    check(one, file)  # all reads have completed
    reader.close()
    os.close(fd)


def test_ctrl_c_during_batches_leaves_every_read_complete(file, monkeypatch):
    """A batch is one call without the interpreter: Ctrl-C is seen when its reads have completed."""
    reader = ring_reader()
    monkeypatch.setattr(aligned_io, "read_at", None)  # the ring reads everything itself
    ended = threading.Event()

    def interrupt() -> None:
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGINT)
            ended.wait(0.003)
        ended.set()

    def taken(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before, interrupts, seed = signal.signal(signal.SIGINT, taken), 0, 0
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        while not ended.is_set():
            try:
                seed += 1
                one, fd = batch(reader, file, 60, seed)
                try:
                    reader.read(one)
                finally:
                    os.close(fd)
                check(one, file)
            except KeyboardInterrupt:
                interrupts += 1
    except KeyboardInterrupt:
        interrupts += 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert interrupts
    one, fd = batch(reader, file, 60)
    reader.read(one)
    check(one, file)
    reader.close()
    os.close(fd)


@pytest.mark.parametrize("name", ["io_uring", "threads", "buffered"])
def test_a_forked_process_reads_with_a_reader_of_its_own(name, file):
    """As many threads as there can be stay behind in its parent, and neither writes to the other's
    buffers.
    """
    try:
        reader = readers.lease(name, False, 4096)
    except OSError as error:
        pytest.skip(f"no {name} here: {error}")
    for seed in range(20):
        one, fd = batch(reader, file, 500, seed)
        reader.read(one)
        os.close(fd)
    free = reader.buffers.take(SIZE)
    free.bytes[:6] = b"parent"
    reader.buffers.give(free)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(120)
            mine = readers.lease(name, False, 4096)
            assert mine is not reader
            one, _ = batch(mine, file, 500)
            mine.read(one)
            check(one, file)
            mine.buffers.take(SIZE).bytes[:6] = b"child!"
            readers.release(reader)  # as the tiers of its parent do when they are dropped there
            assert readers.share(mine) is readers.lease(name, False, 4096)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader.buffers.take(SIZE) is free and bytes(free.bytes[:6]) == b"parent"
    one, fd = batch(reader, file, 7)
    reader.read(one)
    os.close(fd)
    check(one, file)
    readers.release(reader)
