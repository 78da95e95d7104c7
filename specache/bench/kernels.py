"""The kernel backends of `specache.kernels.dispatch`, each of which a benchmark measures."""

from __future__ import annotations

from specache.kernels.dispatch import active, available, using

PLAIN = "torch"

__all__ = ["PLAIN", "active", "available", "using"]
