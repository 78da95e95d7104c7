"""Errors during generation carry the tokens so far, and say what needs less memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from specache.cache.cache import SpeCache
from specache.cache.sizes import on_disk
from specache.config import Policy, SpeCacheConfig
from specache.errors import FastMemoryError, OutOfMemoryError, SpeCacheError
from specache.planning.advice import Suggestion, smaller
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import MemoryPlan
from specache.platform.out_of_memory import is_out_of_memory, on_the_gpu


@contextmanager
def tokens_kept_on_error(
    cache: SpeCache,
    planned: Callable[[], Sequence[PlannedSequence]],
    generated: Callable[[], list[list[int]] | None] = lambda: None,
) -> Iterator[None]:
    """Add `new_token_ids` to errors of specache in the block, and convert out-of-memory errors.

    Args:
        planned: returns the running batch for a memory plan.
        generated: returns the new tokens of each sequence; `None` before the first.

    Raises:
        OutOfMemoryError: in place of an out-of-memory error of the system or the GPU.
    """
    try:
        yield
    except Exception as error:
        new = generated()
        if is_out_of_memory(error) and not isinstance(error, FastMemoryError):
            _free_tensors(error)
            raise _out_of_memory(error, cache, planned(), new) from error  # a local name would make a reference cycle
        if isinstance(error, SpeCacheError):
            _attach(error, new)
        raise


def _out_of_memory(
    error: Exception, cache: SpeCache, planned: Sequence[PlannedSequence], new: list[list[int]] | None
) -> OutOfMemoryError:
    ours = OutOfMemoryError(_explained(error, cache, planned, new))
    _attach(ours, new)
    return ours


def _attach(error: SpeCacheError, new: list[list[int]] | None) -> None:
    error.new_token_ids = new
    if new is not None:
        error.add_note("The tokens that were generated before it are in `new_token_ids` of this error.")


def _free_tensors(error: BaseException) -> None:
    """Clear the frames of the error's tracebacks, which keep the failed pass's tensors alive."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


def _explained(error: Exception, cache: SpeCache, planned: Sequence[PlannedSequence], new: list[list[int]] | None) -> str:
    gpu = cache.info.device.type == "cuda" and on_the_gpu(error)
    where = "on the GPU" if gpu else "in main memory"
    when = "before the first new token" if new is None else f"after {max(map(len, new)):,} new tokens, which are kept"
    cause = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
    return f"Out of memory {where}, {when} ({cause}).{_advice(_smaller(cache, planned, new is None, gpu))}"


def _smaller(cache: SpeCache, planned: Sequence[PlannedSequence], prefilling: bool, gpu: bool) -> list[Suggestion]:
    """Return the settings that need less of the memory that ran out."""
    on_cpu = cache.info.device.type == "cpu"

    def needs(config: SpeCacheConfig, memory: MemoryPlan) -> int:
        fast = (memory.prefill if prefilling else memory.decode).total
        main = 0 if on_disk(config) or config.policy is Policy.FULL else memory.slow
        return fast if gpu else main + (fast if on_cpu else 0)

    return smaller(cache.resources.dimensions, cache.config, planned, needs)


def _advice(suggestions: list[Suggestion]) -> str:
    if not suggestions:
        return " No setting would need less: use a shorter prompt, fewer new tokens, or a machine with more memory."
    return f" The cache would need less with {'; or with '.join(map(str, suggestions))}; or with a shorter prompt."
