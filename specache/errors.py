"""Errors that a user can cause.

Each message says what was wrong, what was expected and what to do.
"""

from __future__ import annotations

from typing import Any


class SpeCacheError(Exception):
    """Base of every error that specache raises on purpose.

    Attributes:
        new_token_ids: tokens generated before the error, per sequence, without prompt and padding;
            None if nothing was being generated. A cache passed as `past_key_values` holds them too
            (except the last) and can be continued from.
    """

    new_token_ids: list[list[int]] | None = None


class ConfigError(SpeCacheError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class UnsupportedModelError(SpeCacheError):
    """The model's attention cannot run over a low-bit copy; the message says why."""


class UsageError(SpeCacheError, ValueError):
    """A call that specache does not support: a decoding mode, an argument, a malformed batch."""


class NonFiniteError(SpeCacheError):
    """The model produced NaN or infinity in its keys or values. Nothing was quantised."""


class FastMemoryError(SpeCacheError, MemoryError):
    """A batch does not fit into the byte budget of fast memory (`fast_memory`)."""


class OutOfMemoryError(FastMemoryError):
    """The system or the GPU ran out of memory.

    The message names settings that need less; `__cause__` is the system's error. A failed decode
    step is undone: the cache is as before, and `new_token_ids` has what was generated.
    """


class GrammarError(SpeCacheError):
    """The grammar of an answer became too complex in the middle, or the model cannot write it."""


class QueueFullError(SpeCacheError):
    """A service has as many waiting requests as it takes. Try again later.

    Attributes:
        retry_after_s: seconds after which a place is expected to be free.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle it with both arguments: a pool of processes that cannot read it hangs."""
        return type(self), (*self.args, self.retry_after_s), self.__dict__


class ServiceClosedError(UsageError):
    """A service takes no more requests: it was closed, or it stopped after an error."""


class SlowTierError(SpeCacheError):
    """The 16-bit rows could not be written to the slow tier or read back.

    The message names the file and what to do.
    """


class CorruptRowError(SlowTierError):
    """A row on disk differs from what was written.

    The message names file, layer, KV head and token position.
    """


class SessionError(SpeCacheError):
    """A session cannot be opened, saved or copied: in use, damaged, or of another model.

    The message says which and why.
    """


class EvaluationError(SpeCacheError):
    """An evaluation cannot continue; finished measurements are kept."""


class MethodUnavailableError(EvaluationError):
    """A method of the suite needs a library or a machine that is not available."""


class TaskDataError(EvaluationError):
    """A file that a task reads is missing or broken; the message names file and line."""


class BenchmarkError(SpeCacheError):
    """A benchmark cannot continue; the message says why."""
