"""The cache of a batch: one `Sequence` per prompt, each with its layers; what transformers sees as `past_key_values`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn, Protocol

from torch import Tensor

from specache.budget import ByteBudget
from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.dimensions import dimensions_of
from specache.errors import SlowTierError, UsageError
from specache.holdings import hot_slots, read_buffer_bytes
from specache.layers import CompressedLayer, DenseLayer, WindowLayer
from specache.model import ModelInfo, inspect_model
from specache.prefetch import FetchedRows, HotSet, InPlaceRows, Rows
from specache.quant.layout import PageLayout
from specache.quant.pool import PagePool, PageTable
from specache.stats import Counters, MemoryUse, report
from specache.tiers.base import SlowTier
from specache.tiers.disk import DiskTier
from specache.tiers.ram import RamTier
from specache.tiers.scratch import prepare_folder
from specache.tiers.transfer import Transfer
from specache.tiers.worker import PrefetchWorker

Layer = CompressedLayer | DenseLayer | WindowLayer
DISK_READERS = 4  # layers whose rows are read from disk at a time


class Resources:
    """What the sequences of a cache (and of its forks) share: fast memory, page pools and the way rows reach the device.

    Attributes:
        dimensions: of the model, by which working sets and hot sets are sized.
        budget: bounds everything that is held in fast memory.
    """

    def __init__(self, model: Any, info: ModelInfo, config: SpeCacheConfig) -> None:
        self.info = info
        self.dimensions = dimensions_of(model, info)
        self.budget = ByteBudget(config.fast_memory)
        self._pools: dict[PageLayout, PagePool] = {}
        self.transfer = Transfer(info.device)

    def page_table(self, config: SpeCacheConfig, keys: Tensor) -> PageTable:
        """An empty table for a layer with keys [Hkv, n, D]."""
        layout = PageLayout(config.code, config.bits, config.group_size, keys.shape[0], keys.shape[2])
        if layout not in self._pools:
            self._pools[layout] = PagePool(layout, keys.device, self.budget)
        return PageTable(self._pools[layout])


class WindowCheckpoints(Protocol):
    """Copies of the sliding windows at some lengths of a sequence, from which it can go on after it was cut."""

    def offer(self, length: int, windows: Mapping[int, WindowLayer]) -> None:
        """The sequence has `length` tokens; keep its windows (by layer) if that is due."""

    def newest(self, length: int) -> tuple[int, dict[int, Tensor]] | None:
        """The longest length that is kept and at most `length`, and its rings by layer."""

    def forget_after(self, length: int) -> None:
        """Tokens from `length` on are gone."""


class Sequence:
    """One sequence's state in every layer. Its tokens are those whose keys and values are stored.

    A pass changes layers one after the other; `commit` makes it count. `undo_pass` takes back a decode pass wherever it stopped,
    `restore` a prefill.
    """

    def __init__(self, cache: SpeCache) -> None:
        self._cache = cache
        self.tier: SlowTier = cache.new_tier()
        self._read_buffers = cache.resources.budget.claim(0, "read buffers")
        self.checkpoints: WindowCheckpoints | None = None
        self.layers: dict[int, Layer] = {}
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._positions_before: dict[int, Tensor | None] = {}  # `next_positions` of the layers when the pass began

    @property
    def length(self) -> int:
        return len(self.token_ids)

    def layer(self, index: int, keys: Tensor) -> Layer:
        """The state of layer `index`, made when its first keys [Hkv, n, D] arrive: only they tell heads and dtype."""
        if index not in self.layers:
            self.layers[index] = layer = self._new_layer(index, keys)
            self._hold_buffers(layer)
        return self.layers[index]

    def commit(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids

    def offer_checkpoint(self) -> None:
        """A chunk of the prompt is through every layer."""
        if self.checkpoints is not None:
            self.checkpoints.offer(self.length, {i: layer for i, layer in self.layers.items() if isinstance(layer, WindowLayer)})

    def begin_pass(self) -> None:
        """Remember what `undo_pass` needs."""
        self._positions_before = {i: layer.next_positions for i, layer in self._compressed()}

    def retire(self) -> None:
        """The pass is through every layer: what it made the residuals too long for becomes low bit."""
        for _, layer in self._compressed():
            layer.retire()

    def undo_pass(self) -> None:
        """Take back a decode pass that did not finish. If even that fails, the sequence forgets everything."""
        try:
            for index, layer in self.layers.items():
                if isinstance(layer, CompressedLayer):
                    layer.undo(self.length, self._positions_before[index])
                else:
                    layer.truncate(self.length)
        except SlowTierError:
            self.clear()

    def can_truncate(self, length: int) -> bool:
        """Whether the state of the first `length` tokens can be had without prefilling them again."""
        return all(layer.can_truncate(length) for layer in self.layers.values())

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens, fewer where the sliding windows must go back to a checkpoint, or none where some layer
        cannot go back that far.

        Raises:
            SlowTierError: the slow tier cannot be read; nothing changed.
            SessionError: a checkpoint cannot be read; nothing changed.
        """
        rings: dict[int, Tensor] = {}
        if not self.can_truncate(length):
            checkpoint = None if self.checkpoints is None else self.checkpoints.newest(length)
            if checkpoint is None or not all(layer.can_truncate(checkpoint[0]) for _, layer in self._compressed()):
                return self.clear()
            length, rings = checkpoint
        residuals = {i: layer.residual_at(length) for i, layer in self._compressed()}  # all are read before anything changes
        for index, layer in self.layers.items():
            if isinstance(layer, CompressedLayer):
                layer.truncate(length, residuals[index])
            elif isinstance(layer, WindowLayer) and index in rings:
                layer.restore(rings[index], length)
            else:
                layer.truncate(length)
        del self.token_ids[length:]
        if self.checkpoints is not None:
            self.checkpoints.forget_after(length)

    def restore(self, length: int, windows: dict[int, WindowLayer]) -> None:
        """Go back to `length` tokens after a prefill that failed; to none if the slow tier does not even allow that."""
        if length == 0:
            return self.clear()
        self.layers.update(windows)
        try:
            self.truncate(length)
        except SlowTierError:
            self.clear()

    def clear(self) -> None:
        """Forget everything and give its memory back."""
        for layer in self.layers.values():
            layer.release()
        self.layers.clear()
        self.token_ids.clear()
        if self.checkpoints is not None:
            self.checkpoints.forget_after(0)
        self._read_buffers.release()
        self.tier.close()

    def windows(self) -> dict[int, WindowLayer]:
        """Copies of the sliding layers, to `restore` after a prefill that failed."""
        return {i: layer.fork() for i, layer in self.layers.items() if isinstance(layer, WindowLayer)}

    def prepare_decode(self) -> None:
        """Size the hot sets for the sequence as it is now."""
        for layer in self.layers.values():
            if isinstance(layer, CompressedLayer):
                layer.rows.resize(self._cache.hot_slots(self, layer))

    def fork(self, cache: SpeCache) -> Sequence:
        """An independent copy that belongs to `cache`."""
        other = Sequence(cache)
        other.token_ids = list(self.token_ids)
        if cache.config.policy is not Policy.FULL:
            other.tier.close()
            other.tier = self.tier.fork()
        for index, layer in self.layers.items():
            other.layers[index] = forked = self._fork_layer(layer, other)
            other._hold_buffers(forked)
        return other

    def held_bytes(self) -> int:
        """Fast memory held of the budget, all pages of the sequence counted."""
        return self._read_buffers.size + sum(layer.held_bytes for layer in self.layers.values())

    def memory(self) -> MemoryUse:
        use = MemoryUse(slow=self.tier.nbytes)
        for layer in self.layers.values():
            if isinstance(layer, WindowLayer):
                use.windows += layer.nbytes
                use.ordinary_windows += layer.ordinary_bytes
                continue
            use.fast += layer.fast_bytes
            use.full += layer.token_bytes * layer.length
            if isinstance(layer, CompressedLayer):
                use.hot += layer.rows.nbytes
        return use

    def _compressed(self) -> list[tuple[int, CompressedLayer]]:
        return [(index, layer) for index, layer in self.layers.items() if isinstance(layer, CompressedLayer)]

    def _hold_buffers(self, layer: Layer) -> None:
        """Take fast memory for a layer's rows on their way from and to the slow tier."""
        if isinstance(layer, CompressedLayer):
            self._read_buffers.resize(self._read_buffers.size + read_buffer_bytes(self._cache.config, layer.row_bytes))

    def _new_layer(self, index: int, keys: Tensor) -> Layer:
        window = self._cache.info.windows[index]
        if window is not None:
            return WindowLayer(index, window, keys, self._cache.resources.budget)
        if self._cache.config.policy is Policy.FULL:
            return DenseLayer(index, keys, self._cache.resources.budget)
        table = self._cache.resources.page_table(self._cache.config, keys)
        return CompressedLayer(index, self._cache.config, table, self.tier, self._cache.rows(self.tier, index, keys), keys)

    def _fork_layer(self, layer: Layer, other: Sequence) -> Layer:
        if isinstance(layer, WindowLayer | DenseLayer):
            return layer.fork()
        if other._cache.config.policy is Policy.FULL:
            dense = DenseLayer(layer.index, layer.residual_keys, other._cache.resources.budget)
            dense.extend(*self.tier.read(layer.index, 0, layer.length))
            return dense
        rows = other._cache.rows(other.tier, layer.index, layer.residual_keys)
        config = other._cache.config
        if config.layout == layer.config.layout:
            return layer.fork(other.tier, rows, config)
        table = other._cache.resources.page_table(config, layer.residual_keys)
        rebuilt = CompressedLayer(layer.index, config, table, other.tier, rows, layer.residual_keys)
        rebuilt.weights = layer.weights.fork(rebuilt.weights.tokens)
        rebuilt.rebuild(self.length)
        return rebuilt


class SpeCache:
    """The key-value cache of a batch of sequences: all rows at 16 bits in slow memory, a low-bit copy in fast memory.

    Hand it on as `past_key_values` to `specache.generate` (or to `model.generate` with `custom_generate=specache.decode`) to
    continue a conversation. `model()` and stock `generate()` cannot use it and raise.

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
        self.expected_sequences = 0  # of the batch that is being prefilled: the hot set's bytes are for all of them
        self.counters = self._new_counters()
        self.sequences: list[Sequence] = []
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
        """Why each sequence's last generation ended: `stop`, `length`, `interrupted`, or `None` before one did."""
        return [sequence.finish_reason for sequence in self.sequences]

    def stats(self) -> dict[str, Any]:
        """What happened so far, JSON-ready; keys in `specache.stats.report`."""
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
        without them its pages are shared.

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
        other = object.__new__(SpeCache)
        other.info, other.config, other.resources = self.info, config, self.resources
        other.counters = other._new_counters()
        other.counters.prefill_s = self.counters.prefill_s
        other._model, other._worker, other.expected_sequences = self._model, None, 0
        other.sequences = [sequence.fork(other) for sequence in self.sequences]
        return other

    def new_sequence(self) -> Sequence:
        return Sequence(self)

    def repeat(self, index: int) -> Sequence:
        """Another sequence with the state of sequence `index` (equal prompts are prefilled once)."""
        return self.sequences[index].fork(self)

    def close(self) -> None:
        """End background work and free everything."""
        for sequence in self.sequences:
            sequence.clear()
        self.sequences.clear()
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> SpeCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        worker = getattr(self, "_worker", None)
        if worker is not None:
            worker.abandon()

    # What sequences need of their cache

    def new_tier(self) -> SlowTier:
        if self.config.slow_tier is SlowTierKind.DISK and self.config.policy is not Policy.FULL:
            assert self.config.slow_dir is not None, "checked by SpeCacheConfig"
            return DiskTier(self.config.slow_dir)
        return RamTier(in_place=self.config.slow_tier is SlowTierKind.RAM_INPLACE, pinned=self.info.device.type == "cuda")

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
