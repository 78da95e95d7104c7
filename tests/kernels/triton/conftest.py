"""Tests of the Triton kernels in Triton's interpreter, on the CPU.

Triton decides whether it interprets when it is imported: `tests/kernels/test_triton.py` runs these
files in a process of their own, with `TRITON_INTERPRET=1`; without it they are not collected.
"""

from __future__ import annotations

from specache.kernels import triton as triton_kernels

collect_ignore_glob = [] if triton_kernels.interpreted() else ["test_*"]
