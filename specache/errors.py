"""Errors that a user can cause. Each message says what was wrong, what was expected and what to do."""

from __future__ import annotations


class SpeCacheError(Exception):
    """Base of every error that specache raises on purpose.

    Attributes:
        new_token_ids: what was generated before the error: per sequence its new tokens, without prompt and padding. `None` where
            nothing was being generated. A cache that was given as `past_key_values` holds them too (but the last) and can be
            continued from.
    """

    new_token_ids: list[list[int]] | None = None


class ConfigError(SpeCacheError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class UnsupportedModelError(SpeCacheError):
    """The model's attention cannot be run over a low-bit copy (and why)."""


class UsageError(SpeCacheError, ValueError):
    """A call that specache cannot honour: a decoding mode, an argument, a malformed batch."""


class NonFiniteError(SpeCacheError):
    """The model produced NaN or infinity in its keys or values; nothing was packed."""


class FastMemoryError(SpeCacheError, MemoryError):
    """A batch does not fit into the byte budget of fast memory (`fast_memory`)."""


class OutOfMemoryError(FastMemoryError):
    """The system or the GPU had no memory left. The message names settings that need less; `__cause__` is the system's error.

    A decode step that fails is undone: the cache is as it was before, and `new_token_ids` has what was generated.
    """


class SlowTierError(SpeCacheError):
    """The 16-bit rows could not be written to the slow tier or read back; the message names the file and what to do."""


class CorruptRowError(SlowTierError):
    """A row on disk is not the one that was written; the message names file, layer, KV head and token position."""


class SessionError(SpeCacheError):
    """A session cannot be opened, saved or copied: it is in use, damaged, or of another model; the message says which and why."""


class EvaluationError(SpeCacheError):
    """An evaluation cannot go on; what was measured so far is kept."""


class MethodUnavailableError(EvaluationError):
    """A method of the suite needs a library or a machine that is not there."""


class TaskDataError(EvaluationError):
    """A file that a task reads is missing or broken; the message names file and line."""


class BenchmarkError(SpeCacheError):
    """A benchmark cannot go on; the message says why."""
