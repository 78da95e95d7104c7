"""The cache of a batch: one `Sequence` per prompt; what transformers sees as `past_key_values`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn

from torch import Tensor

from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.device.main_memory import MainMemory
from specache.device.pinned import PinnedPool
from specache.device.streams import streams_for
from specache.errors import UsageError
from specache.holdings import hot_slots
from specache.hot_set import HotSet
from specache.layers import CompressedLayer
from specache.model import inspect_model
from specache.prefetch import FetchedRows, InPlaceRows, Rows
from specache.resources import Resources
from specache.sequence import Sequence
from specache.stats import Counters, MemoryUse, report
from specache.tiers.base import SlowTier
from specache.tiers.disk import DiskTier
from specache.tiers.ram import RamTier
from specache.tiers.scratch import prepare_folder
from specache.tiers.worker import PrefetchWorker

DISK_READERS = 4  # layers whose rows are read from disk at a time


class SpeCache:
    """The key-value cache of a batch of sequences: all rows at 16 bits in slow memory, a low-bit copy in fast memory.

    Hand it on as `past_key_values` to `specache.generate` (or to `model.generate` with `custom_generate=specache.decode`) to
    continue a conversation; `reset` begins another text. `model()` and stock `generate()` cannot use it and raise.

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
        self.info = inspect_model(model)
        self.config = (config or SpeCacheConfig()).resolved(self.info.device.type)
        if self.config.slow_dir is not None:
            prepare_folder(self.config.slow_dir)  # what is wrong with it shows before a prompt is prefilled
        self.resources = Resources(model, self.info, self.config)
        self._main_memory = self._new_main_memory()
        self.expected_sequences = 0  # of the batch that is being prefilled: the hot set's bytes are for all of them
        self.counters = self._new_counters()
        self.sequences: list[Sequence] = []
        self.lent: Callable[[], None] | None = None  # gives back what a batch on the device holds of the sequences' state
        self._model = weakref.ref(model)
        self._worker: PrefetchWorker | None = None

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
        """What happened so far, JSON-ready; keys in `specache.stats.report`."""
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
        self.settle()
        other = object.__new__(SpeCache)
        other.info, other.config, other.resources = self.info, config, self.resources
        other._main_memory = self._main_memory
        other.counters = other._new_counters()
        other.counters.prefill_s = self.counters.prefill_s
        other._model, other._worker, other.expected_sequences, other.lent = self._model, None, 0, None
        other.sequences = [sequence.fork(other) for sequence in self.sequences]
        return other

    def new_sequence(self) -> Sequence:
        return Sequence(self)

    def repeat(self, index: int) -> Sequence:
        """Another sequence with the state of sequence `index` (equal prompts are prefilled once)."""
        self.settle()
        return self.sequences[index].fork(self)

    def reset(self) -> None:
        """Forget every token and begin anew, with the same model and settings: what is generated next is another text."""
        self.settle()
        for sequence in self.sequences:
            sequence.clear()
            sequence.finish_reason = None
        if not self.one_sequence:
            self.sequences = []
        self.counters = self._new_counters()

    def close(self) -> None:
        """End background work and free everything, also where a part of that fails."""
        sequences, self.sequences = self.sequences, []
        worker, self._worker = self._worker, None
        with ExitStack() as stack:  # the worker comes last
            if worker is not None:
                stack.callback(worker.close)
            for sequence in sequences:
                stack.callback(sequence.clear)
            stack.callback(self.settle)

    def __enter__(self) -> SpeCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        worker = getattr(self, "_worker", None)
        if worker is not None:
            worker.abandon()

    # What sequences need of their cache (`sequence.Owner`)

    def new_tier(self) -> SlowTier:
        if self.config.slow_tier is SlowTierKind.DISK and self.config.policy is not Policy.FULL:
            assert self.config.slow_dir is not None, "checked by SpeCacheConfig"
            return DiskTier(self.config.slow_dir)
        if self._main_memory is not None:
            return self._main_memory.new_tier()
        return RamTier(in_place=self.config.slow_tier is SlowTierKind.RAM_INPLACE)

    def _new_main_memory(self) -> MainMemory | None:
        if self.info.device.type != "cuda":
            return None
        return MainMemory(streams_for(self.info.device), PinnedPool(self.config.pinned_memory))

    def rows(self, tier: SlowTier, index: int, keys: Tensor) -> Rows:
        """A decode step's access to the 16-bit rows of a layer with keys [Hkv, n, D]."""
        if tier.in_place or not (self.config.policy.verifies or self.config.policy.prefetches):
            return InPlaceRows(tier, index)
        if self._worker is None:
            self._worker = PrefetchWorker(DISK_READERS if self.config.slow_tier is SlowTierKind.DISK else 1)
        hot = HotSet(keys.shape[0], 0, 2 * keys.shape[2], keys.dtype, keys.device, self.resources.budget)
        return FetchedRows(tier, index, hot, self._worker, self.resources.transfer, self.counters)

    def hot_slots(self, sequence: Sequence, layer: CompressedLayer) -> int:
        """Slots per KV head that the hot set's budget gives a layer."""
        heads, _, dim = layer.residual_keys.shape
        sequences = max(len(self.sequences), self.expected_sequences)
        return hot_slots(self.resources.dimensions, self.config, heads, dim, sequence.length, sequences)

    def _new_counters(self) -> Counters:
        policy = self.config.policy
        copies = self.config.slow_tier is not SlowTierKind.RAM_INPLACE
        return Counters(prefetches=copies and policy.prefetches, speculates=policy.guesses)

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
