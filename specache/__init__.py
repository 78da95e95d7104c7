"""specache: run the context your memory can't hold, without forgetting any of it.

An implementation of SpeCache (Jie et al., ICML 2025) for Hugging Face transformers: every key-value
pair stays at 16 bits in slow memory, attention runs over a packed 1- to 4-bit copy in fast memory,
and the few pairs that matter are prefetched by a speculative token one step ahead.
"""

from typing import TYPE_CHECKING

from specache.config import Code, Policy, SlowTierKind, SpeCacheConfig
from specache.errors import (
    ConfigError,
    FastMemoryError,
    NonFiniteError,
    OutOfMemoryError,
    QueueFullError,
    ServiceClosedError,
    SessionError,
    SlowTierError,
    SpeCacheError,
    UnsupportedModelError,
    UsageError,
)
from specache.platform.lazy import importer

if TYPE_CHECKING:
    from specache.cache.cache import SpeCache
    from specache.engine.compiled import compile_decode
    from specache.engine.engine import Engine
    from specache.engine.events import Job
    from specache.engine.generate import decode, generate, make_request, prefill
    from specache.engine.prefix_store import PrefixStore
    from specache.engine.service import EngineService
    from specache.sessions import Session

__version__ = "0.1.0"

__all__ = [
    "Code",
    "ConfigError",
    "Engine",
    "EngineService",
    "FastMemoryError",
    "Job",
    "NonFiniteError",
    "OutOfMemoryError",
    "Policy",
    "PrefixStore",
    "QueueFullError",
    "ServiceClosedError",
    "Session",
    "SessionError",
    "SlowTierError",
    "SlowTierKind",
    "SpeCache",
    "SpeCacheConfig",
    "SpeCacheError",
    "UnsupportedModelError",
    "UsageError",
    "compile_decode",
    "decode",
    "generate",
    "make_request",
    "prefill",
]

__getattr__ = importer(
    __name__,
    {
        "Engine": "specache.engine.engine",
        "EngineService": "specache.engine.service",
        "Job": "specache.engine.events",
        "PrefixStore": "specache.engine.prefix_store",
        "Session": "specache.sessions",
        "SpeCache": "specache.cache.cache",
        "compile_decode": "specache.engine.compiled",
        "decode": "specache.engine.generate",
        "generate": "specache.engine.generate",
        "make_request": "specache.engine.generate",
        "prefill": "specache.engine.generate",
        "sessions": "specache.sessions",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
