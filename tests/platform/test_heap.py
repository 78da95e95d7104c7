"""The heap returns large blocks if memory is limited, and only then."""

from __future__ import annotations

import subprocess
import sys

import pytest

from specache.cli import options
from specache.config import SpeCacheConfig
from specache.platform import heap

SCRIPT = """
import ctypes
from specache.platform import heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def last_has_own_mapping():
    blocks = [libc.malloc(1 << 20) for _ in range(8)]
    size = ctypes.c_size_t.from_address(blocks[-1] - ctypes.sizeof(ctypes.c_size_t)).value  # glibc: its second bit says mapped
    for block in blocks:
        libc.free(block)
    return bool(size & 2)

last_has_own_mapping()  # large blocks that are freed raise the threshold
before = last_has_own_mapping()
print(heap.keep_small(), before, last_has_own_mapping())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_freed_large_blocks_return_to_the_system_at_once():
    done, before, after = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout.split()
    if done == "False":
        pytest.skip("another C library")
    assert (before, after) == ("False", "True")


def test_the_heap_is_kept_small_only_with_limited_memory(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(heap, "keep_small", lambda: asked.append(1))
    options.keep_memory_bounded(SpeCacheConfig(slow_tier="ram"))
    assert not asked
    options.keep_memory_bounded(SpeCacheConfig(slow_tier=f"disk:{tmp_path}"))
    options.keep_memory_bounded(SpeCacheConfig(fast_memory=10**9))
    assert len(asked) == 2
