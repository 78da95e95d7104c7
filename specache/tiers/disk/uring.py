"""Linux's io_uring for batches of reads: fill a ring, make one system call, read the results.

It uses `ctypes` and NumPy: nothing is compiled, and a batch costs a few array operations. The
structures are those of `linux/io_uring.h`, the same on every architecture. A ring serves one thread
at a time.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]

_SETUP, _ENTER = 425, 426  # system call numbers
_GETEVENTS = 1
_OP_READ = 22
_SINGLE_MMAP = 1  # feature: both rings lie in one mapping (Linux 5.4)
_SQES_OFFSET = 0x10000000
_SQ_HEAD, _SQ_TAIL, _SQ_ARRAY = 0, 1, 6  # indices into the offsets that the kernel returns
_CQ_HEAD, _CQ_TAIL, _CQ_ENTRIES = 0, 1, 5


class _Params(ctypes.Structure):
    _fields_ = (
        ("sq_entries", ctypes.c_uint32),
        ("cq_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("sq_thread_cpu", ctypes.c_uint32),
        ("sq_thread_idle", ctypes.c_uint32),
        ("features", ctypes.c_uint32),
        ("wq_fd", ctypes.c_uint32),
        ("resv", ctypes.c_uint32 * 3),
        ("sq_off", ctypes.c_uint32 * 10),
        ("cq_off", ctypes.c_uint32 * 10),
    )


_SQE = np.dtype(
    {
        "names": ["opcode", "fd", "offset", "address", "length", "user_data"],
        "formats": ["u1", "i4", "u8", "u8", "u4", "u8"],
        "offsets": [0, 4, 8, 16, 24, 32],
        "itemsize": 64,
    }
)
_CQE = np.dtype([("user_data", "u8"), ("result", "i4"), ("flags", "u4")])

assert ctypes.sizeof(_Params) == 120
assert _CQE.itemsize == 16


class Ring:
    """A pair of rings shared with the kernel.

    Raises:
        OSError: the kernel has no io_uring, or forbids it (containers often do).
    """

    def __init__(self, entries: int) -> None:
        self._fd = -1
        try:
            self._syscall: Any = ctypes.CDLL(None, use_errno=True).syscall
        except (AttributeError, OSError):
            raise OSError(errno.ENOSYS, "no system calls by number") from None
        params = _Params()
        self._fd = self._call(_SETUP, entries, ctypes.byref(params))
        try:
            self._map(params)
        except BaseException:
            self.close()
            raise

    def read(self, fds: Index, offsets: Index, addresses: Index, lengths: Index) -> Index:
        """Perform at most `entries` reads into memory; return bytes read or negative error numbers.

        No read is running any more when this returns or raises.

        Raises:
            OSError: the kernel accepted none of them.
        """
        count = len(fds)
        self._cq_head[0] = self._cq_tail[0]  # nothing is running: drop what an interrupted call left in the ring
        tail = int(self._sq_head[0])
        slots = (tail + np.arange(count)) % self.entries
        for name, values in (("fd", fds), ("offset", offsets), ("address", addresses), ("length", lengths)):
            self._sqes[name][slots] = values
        self._sqes["user_data"][slots] = np.arange(count)
        self._sq_tail[0] = (tail + count) & 0xFFFFFFFF
        self._wait(count)
        head = int(self._cq_head[0])
        done = self._cqes[(head + np.arange(count)) % len(self._cqes)]
        results = np.empty(count, np.int64)
        results[done["user_data"].astype(np.int64)] = done["result"]
        return results

    def close(self) -> None:
        """Free the ring. No read may be running."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        for name in ("_sqes", "_sq_head", "_sq_tail", "_cq_head", "_cq_tail", "_cqes"):
            self.__dict__.pop(name, None)  # the mappings: each keeps a descriptor of its own

    def _map(self, params: _Params) -> None:
        if not params.features & _SINGLE_MMAP:
            raise OSError(errno.ENOSYS, "an io_uring older than Linux 5.4")
        sq, cq = list(params.sq_off), list(params.cq_off)
        size = max(sq[_SQ_ARRAY] + params.sq_entries * 4, cq[_CQ_ENTRIES] + params.cq_entries * _CQE.itemsize)
        ring = mmap.mmap(self._fd, size)
        self._sqes = np.frombuffer(mmap.mmap(self._fd, params.sq_entries * _SQE.itemsize, offset=_SQES_OFFSET), _SQE)
        self._sqes["opcode"] = _OP_READ
        self._sq_head = np.frombuffer(ring, np.uint32, 1, sq[_SQ_HEAD])
        self._sq_tail = np.frombuffer(ring, np.uint32, 1, sq[_SQ_TAIL])
        self._cq_head = np.frombuffer(ring, np.uint32, 1, cq[_CQ_HEAD])
        self._cq_tail = np.frombuffer(ring, np.uint32, 1, cq[_CQ_TAIL])
        self._cqes = np.frombuffer(ring, _CQE, params.cq_entries, cq[_CQ_ENTRIES])
        np.frombuffer(ring, np.uint32, params.sq_entries, sq[_SQ_ARRAY])[:] = np.arange(params.sq_entries)
        self.entries = params.sq_entries

    def _wait(self, count: int) -> None:
        """Submit the ring and wait for `count` results, even if interrupted.

        The kernel writes into our memory until then.
        """
        interrupted: BaseException | None = None
        submitted = 0
        while True:
            try:
                if self._completed() == count:
                    break
                submitted += self._call(_ENTER, self._fd, count - submitted, count, _GETEVENTS, None, 0)
            except InterruptedError:
                continue
            except OSError:
                if submitted == 0:
                    raise
            except BaseException as error:  # Ctrl-C
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def _completed(self) -> int:
        return (int(self._cq_tail[0]) - int(self._cq_head[0])) & 0xFFFFFFFF

    def _call(self, number: int, *arguments: Any) -> int:
        result: int = self._syscall(number, *arguments)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result
