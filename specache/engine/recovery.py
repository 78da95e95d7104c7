"""An error in the middle of generating: what was generated goes with it, and it says what would need less memory."""

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
def tokens_kept(
    cache: SpeCache,
    planned: Callable[[], Sequence[PlannedSequence]],
    generated: Callable[[], list[list[int]] | None] = lambda: None,
) -> Iterator[None]:
    """Inside, our errors get `new_token_ids`, and what the system or the GPU raises without memory becomes ours.

    Args:
        planned: returns the batch that is under way.
        generated: new tokens of each sequence so far; `None` before the first ones.

    Raises:
        OutOfMemoryError: instead of the system's error.
    """
    try:
        yield
    except Exception as error:
        new = generated()
        if is_out_of_memory(error) and not isinstance(error, FastMemoryError):
            _free_tensors(error)
            raise _out_of_memory(error, cache, planned(), new) from error  # a name for it here would be a cycle
        if isinstance(error, SpeCacheError):
            _attach(error, new)
        raise


def _out_of_memory(
    error: Exception, cache: SpeCache, loads: Sequence[PlannedSequence], new: list[list[int]] | None
) -> OutOfMemoryError:
    ours = OutOfMemoryError(_explained(error, cache, loads, new))
    _attach(ours, new)
    return ours


def _attach(error: SpeCacheError, new: list[list[int]] | None) -> None:
    error.new_token_ids = new
    if new is not None:
        error.add_note("The tokens that were generated before it are in `new_token_ids` of this error.")


def _free_tensors(error: BaseException) -> None:
    """Let go of the failed pass's tensors, which live as long as the frames that the error refers to."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


def _explained(error: Exception, cache: SpeCache, loads: Sequence[PlannedSequence], new: list[list[int]] | None) -> str:
    gpu = cache.info.device.type == "cuda" and on_the_gpu(error)
    where = "on the GPU" if gpu else "in main memory"
    when = "before the first new token" if new is None else f"after {max(map(len, new)):,} new tokens, which are kept"
    said = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
    return f"Out of memory {where}, {when} ({said}).{_advice(_smaller(cache, loads, new is None, gpu))}"


def _smaller(cache: SpeCache, loads: Sequence[PlannedSequence], prefilling: bool, gpu: bool) -> list[Suggestion]:
    on_cpu = cache.info.device.type == "cpu"

    def needs(config: SpeCacheConfig, planned: MemoryPlan) -> int:
        fast = (planned.prefill if prefilling else planned.decode).total
        main = 0 if on_disk(config) or config.policy is Policy.FULL else planned.slow
        return fast if gpu else main + (fast if on_cpu else 0)

    return smaller(cache.resources.dimensions, cache.config, loads, needs)


def _advice(found: list[Suggestion]) -> str:
    if not found:
        return " No setting would need less: use a shorter prompt, fewer new tokens, or a machine with more memory."
    return f" The cache would need less with {'; or with '.join(map(str, found))}; or with a shorter prompt."
