"""The cache of a batch: one `Sequence` per prompt; what transformers sees as `past_key_values`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn

from specache import modes
from specache.cache_context import CacheContext
from specache.config import Policy, SpeCacheConfig
from specache.errors import UsageError
from specache.layers import CompressedLayer
from specache.model import ModelInfo, inspect_model
from specache.one_call import OneCallAtATime
from specache.resources import Resources
from specache.sequence import Sequence
from specache.stats import Counters, MemoryUse, report
from specache.tiers.scratch import prepare_folder


class SpeCache:
    """The key-value cache of a batch of sequences: all rows at 16 bits in slow memory, a low-bit copy in fast memory.

    Hand it on as `past_key_values` to `specache.generate` (or to `model.generate` with `custom_generate=specache.decode`) to
    continue a conversation. `model()` and stock `generate()` cannot use it and raise.

    One call at a time uses it, in the process that made it: another thread is refused, and should have a cache of its own.
    `copy.deepcopy(cache)` is `cache.fork()`. A cache that nothing refers to is freed at once.

    Args:
        model: a transformers model for text generation.
        config: settings; `None` takes the defaults. `cache.config` has every `auto` decided.

    Raises:
        UnsupportedModelError: the model's attention cannot run over a low-bit copy.
        ConfigError: settings that this model or device does not allow.
        SlowTierError: the folder of `slow_tier='disk:...'` cannot be written.
    """

    one_sequence = False  # whether it belongs to a session, which holds no batch

    def __init__(self, model: Any, config: SpeCacheConfig | None = None) -> None:
        info = inspect_model(model)
        config = (config or SpeCacheConfig()).resolved(info.device.type)
        if config.slow_dir is not None:
            prepare_folder(config.slow_dir)  # what is wrong with it shows before a prompt is prefilled
        context = CacheContext(info, config, Resources(model, info, config))
        self._begin(context, weakref.ref(model))

    def _begin(self, context: CacheContext, model: Callable[[], Any]) -> None:
        self._context = context
        self._model = model
        self.in_use = OneCallAtATime()
        self.sequences: list[Sequence] = []
        self.lent: Callable[[], None] | None = None  # gives back what a batch on the device holds of the sequences' state

    @property
    def info(self) -> ModelInfo:
        return self._context.info

    @property
    def config(self) -> SpeCacheConfig:
        return self._context.config

    @property
    def resources(self) -> Resources:
        return self._context.resources

    @property
    def counters(self) -> Counters:
        return self._context.counters

    @property
    def expected_sequences(self) -> int:
        """Of the batch that is being prefilled."""
        return self._context.expected_sequences

    @expected_sequences.setter
    def expected_sequences(self, count: int) -> None:
        self._context.expected_sequences = count

    def check_model(self, model: Any) -> None:
        """Refuse to continue with another model than the one that filled the cache.

        Raises:
            UsageError: it is another one.
        """
        mine = self._model()
        if mine is model or (mine is None and inspect_model(model).fingerprint == self.info.fingerprint):
            return
        raise UsageError(
            "This SpeCache was filled by another model; its keys and values mean nothing to this one. "
            "Continue with the model it was made for, or start a new SpeCache(model, config)."
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens stored, of the longest sequence."""
        return max((sequence.length for sequence in self.sequences), default=0)

    @property
    def finish_reasons(self) -> list[str | None]:
        """Why each sequence's last generation ended: `stop`, `length`, `interrupted`, `error`, or `None` before one did."""
        return [sequence.finish_reason for sequence in self.sequences]

    def settle(self) -> None:
        """Have the sequences hold their whole state themselves, also where a batch decodes on the device."""
        if self.lent is not None:
            self.lent()

    def stats(self) -> dict[str, Any]:
        """What happened so far, JSON-ready; keys in `specache.stats.report`. Any thread may ask, also while another generates."""
        if not self.in_use.elsewhere:
            self.settle()
        return report(self.memory(), self.counters, self.resources.budget.peak)

    def held_bytes(self) -> int:
        """Fast memory that this cache's sequences hold of the budget, shared pages counted once per sequence."""
        return sum(sequence.held_bytes() for sequence in self.sequences)

    def memory(self) -> MemoryUse:
        """Bytes held now, counted from the tensors."""
        total = MemoryUse()
        for use in (sequence.memory() for sequence in self.sequences):
            for name, value in vars(use).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    def fork(self, policy: Policy | str | None = None, **changes: Any) -> SpeCache:
        """An independent copy of the state, optionally under other settings: shares the prefill.

        Settings that the low-bit copy depends on (`code`, `bits`, `group_size`, `residual`) make it anew from the 16-bit rows;
        without them its pages are shared. The rotated code's key weights stay those of the original, made from its first
        `residual + group_size` tokens: their queries are kept no longer than that.

        Raises:
            UsageError: another slow tier, or `full` back to a low-bit policy.
        """
        if policy is not None:
            changes["policy"] = policy
        if "slow_tier" in changes or "slow_dir" in changes:
            raise UsageError("A fork keeps slow_tier: its rows lie there. Prefill a new SpeCache.")
        config = replace(self.config, **changes).resolved(self.info.device.type)
        if self.config.policy is Policy.FULL and config.policy is not Policy.FULL:
            raise UsageError("A cache with policy 'full' has no low-bit copy; prefill a new SpeCache with the other policy.")
        with self.in_use.by("fork"), modes.ours():
            self.settle()
            other = object.__new__(SpeCache)
            other._begin(self._context.fork(config), self._model)
            other.counters.prefill_s = self.counters.prefill_s
            other.sequences = [sequence.fork(other.context) for sequence in self.sequences]
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> SpeCache:
        """`fork()`, as transformers' own caches are copied to use a prefilled prompt again."""
        memo[id(self)] = other = self.fork()
        return other

    def __copy__(self) -> SpeCache:
        """`fork()` too: two caches over the same sequences would spoil each other."""
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "A SpeCache cannot be pickled: its 16-bit pairs, threads and files belong to this process. To keep its state or to "
            "continue it in another process use a session (specache.Session); to copy it here use cache.fork()."
        )

    @property
    def context(self) -> CacheContext:
        """What its sequences need of it."""
        return self._context

    def new_sequence(self) -> Sequence:
        return Sequence(self._context)

    def repeat(self, index: int) -> Sequence:
        """Another sequence with the state of sequence `index` (equal prompts are prefilled once)."""
        self.settle()
        return self.sequences[index].fork(self._context)

    def close(self) -> None:
        """End background work and free everything, also where a part of that fails.

        Raises:
            UsageError: a call is using it; nothing changed.
        """
        if self.in_use.forked:
            return self._forget()
        with self.in_use.by("close"):
            self.free()

    def free(self) -> None:
        """`close` for the call that is using it."""
        sequences, self.sequences = self.sequences, []
        with ExitStack() as stack:  # the worker comes last
            stack.callback(self._context.end_worker)
            for sequence in sequences:
                stack.callback(sequence.clear)
            stack.callback(self.settle)

    def _forget(self) -> None:
        """In a process that was forked: threads and files are its parent's, and only the memory is given back."""
        self.sequences, self.lent = [], None
        self._context.forget_worker()

    def __enter__(self) -> SpeCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def hot_slots(self, sequence: Sequence, layer: CompressedLayer) -> int:
        """Slots per KV head that the hot set's budget gives a layer."""
        return self._context.hot_slots(sequence.length, layer)

    # What transformers would ask of a cache of its own

    is_compileable = False

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_stock_call()

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_stock_call()

    def get_query_offset(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_stock_call()

    def get_max_cache_shape(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_stock_call()

    def reorder_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_stock_call()


def _refuse_stock_call() -> NoReturn:
    raise UsageError(
        "A SpeCache cannot be used by model(...) or by generate() alone. Call specache.generate(model, ..., "
        "past_key_values=cache), or model.generate(..., custom_generate=specache.decode, past_key_values=cache)."
    )
