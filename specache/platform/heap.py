"""The C library's heap, told to give memory back: without it a process holds far more than what is in use."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_MMAP_THRESHOLD = -3  # of mallopt, glibc
_OWN_MAPPING_BYTES = 128 << 10


def keep_small() -> bool:
    """Give large blocks mappings of their own from now on, which go back to the system once they are free -> whether that is done.

    glibc begins so, but each large block that is freed makes it put larger ones into the heap, where what stays for long keeps the
    holes between from going back. Costs a tenth of a prefill's time. For processes of our own whose memory is bounded, not for
    somebody's who imports the library.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # elsewhere the number means something else
        return bool(libc.mallopt(_MMAP_THRESHOLD, _OWN_MAPPING_BYTES))
    return False


def give_back() -> bool:
    """Give what is free in the heap back to the system -> whether the C library can do that (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        return True
    return False
