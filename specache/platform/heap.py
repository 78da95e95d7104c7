"""Make the C library's heap return freed memory, which a process would otherwise keep."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_MMAP_THRESHOLD = -3  # parameter of glibc's mallopt
_OWN_MAPPING_BYTES = 128 << 10


def keep_small() -> bool:
    """Give large blocks mappings of their own, which return to the system when freed.

    Return True on success.

    glibc starts this way, but each freed large block raises its threshold, and long-lived blocks
    then keep the holes between them. This costs a tenth of a prefill's time. It is for processes of
    our own with bounded memory, not for a program that imports the library.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # in other C libraries the number has another meaning
        return bool(libc.mallopt(_MMAP_THRESHOLD, _OWN_MAPPING_BYTES))
    return False


def give_back() -> bool:
    """Return the heap's free memory to the system, and return True if the C library can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        return True
    return False
