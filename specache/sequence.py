"""One sequence's state in every layer: what a pass changes, how it is taken back, cut and forked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from specache.config import Policy, SpeCacheConfig
from specache.holdings import CHECKPOINT_FEWEST, read_buffer_bytes
from specache.layers import CompressedLayer, DenseLayer
from specache.model import ModelInfo
from specache.out_of_memory import is_out_of_memory
from specache.prefetch import Rows
from specache.resources import Resources
from specache.stats import MemoryUse
from specache.tiers.base import SlowTier
from specache.window_checkpoints import MemoryCheckpoints, Spacing, WindowCheckpoints
from specache.window_layer import WindowLayer

Layer = CompressedLayer | DenseLayer | WindowLayer


class Owner(Protocol):
    """What a sequence needs of the cache that it belongs to."""

    info: ModelInfo
    config: SpeCacheConfig
    resources: Resources

    def new_tier(self) -> SlowTier:
        """An empty slow tier of the configured kind."""

    def rows(self, tier: SlowTier, index: int, keys: Tensor) -> Rows:
        """A decode step's access to the 16-bit rows of a layer with keys [Hkv, n, D]."""

    def hot_slots(self, sequence: Sequence, layer: CompressedLayer) -> int:
        """Slots per KV head that the hot set's budget gives a layer."""

    def most_checkpoint_bytes(self, tokens: int) -> int:
        """Bytes that the checkpoints of a sequence of `tokens` may take."""


class Sequence:
    """One sequence's state in every layer. Its tokens are those whose keys and values are stored.

    A pass changes layers one after the other; `commit` makes it count. `undo_pass` takes back a decode pass wherever it stopped,
    `restore` a prefill.
    """

    def __init__(self, cache: Owner) -> None:
        self._cache = cache
        self.tier: SlowTier = cache.new_tier()
        self._read_buffers = cache.resources.budget.claim(0, "read buffers")
        self.checkpoints: WindowCheckpoints | None = self._new_checkpoints()
        self.layers: dict[int, Layer] = {}
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._positions_before: dict[int, Tensor | None] = {}  # `next_positions` of the layers when the pass began

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def compressed(self) -> dict[int, CompressedLayer]:
        """Its full-attention layers, by number; none under policy `full`."""
        return {index: layer for index, layer in sorted(self.layers.items()) if isinstance(layer, CompressedLayer)}

    @property
    def sliding(self) -> dict[int, WindowLayer]:
        """Its sliding-window layers, by number."""
        return {index: layer for index, layer in sorted(self.layers.items()) if isinstance(layer, WindowLayer)}

    def layer(self, index: int, keys: Tensor) -> Layer:
        """The state of layer `index`, made when its first keys [Hkv, n, D] arrive: only they tell heads and dtype."""
        if index not in self.layers:
            self.layers[index] = layer = self._new_layer(index, keys)
            self._hold_buffers(layer)
        return self.layers[index]

    def commit(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids

    def begin_prefill(self) -> None:
        """Keep the windows as they are: here begins what the next request changes."""
        self._offer_checkpoint()

    def begin_chunk(self, stop: int, total: int) -> None:
        """The next pass brings a prompt of `total` tokens to `stop`."""
        if self.checkpoints is not None:
            self.checkpoints.begin(self.length, stop, total)

    def capture_window(self, layer: WindowLayer, keys: Tensor, values: Tensor) -> None:
        """A sliding layer is about to store a chunk's keys and values [Hkv, n, D]."""
        if self.checkpoints is not None:
            with self._checkpoints_optional(self.checkpoints):
                self.checkpoints.capture(layer, keys, values)

    def end_chunk(self) -> None:
        """A chunk of the prompt is through every layer."""
        if self.checkpoints is not None:
            self.checkpoints.end(self.length, self._most_checkpoint_bytes())

    def end_step(self) -> None:
        """A token of the answer is through every layer."""
        if self.checkpoints is not None and self.checkpoints.spacing.due_in_answer(self.length):
            self._offer_checkpoint()

    def begin_pass(self) -> None:
        """Remember what `undo_pass` needs."""
        self._positions_before = {i: layer.next_positions for i, layer in self.compressed.items()}

    def retire(self) -> None:
        """The pass is through every layer: what it made the residuals too long for becomes low bit."""
        for layer in self.compressed.values():
            layer.retire()

    def undo_pass(self) -> None:
        """Take back a decode pass that did not finish. If even that fails, the sequence forgets everything.

        What made the pass fail is what the caller raises, so this raises nothing.
        """
        try:
            for index, layer in self.layers.items():
                if isinstance(layer, CompressedLayer):
                    layer.undo(self.length, self._positions_before[index])
                else:
                    layer.truncate(self.length)
        except BaseException:  # also Ctrl-C: half of it must not stay
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
        stored, rings = 0, dict[int, Tensor]()
        if not self.can_truncate(length):
            checkpoint = None if self.checkpoints is None else self.checkpoints.newest(length)
            if checkpoint is None:
                return self.clear()
            stored, rings = checkpoint
            length = min(length, stored)
            if not all(layer.can_truncate(length) for layer in self.compressed.values()):
                return self.clear()
        residuals = {i: layer.residual_at(length) for i, layer in self.compressed.items()}  # all are read before anything changes
        for index, layer in self.layers.items():
            if isinstance(layer, CompressedLayer):
                layer.truncate(length, residuals[index])
            elif isinstance(layer, WindowLayer) and index in rings:
                layer.restore(rings[index], stored)
                layer.truncate(length)
            else:
                layer.truncate(length)
        del self.token_ids[length:]
        if self.checkpoints is not None:
            self.checkpoints.forget_after(length)

    def restore(self, length: int, windows: dict[int, WindowLayer]) -> None:
        """Go back to `length` tokens after a prefill that failed, to none if even that fails.

        What made the prefill fail is what the caller raises, so this raises nothing.
        """
        if length == 0:
            return self.clear()
        self.layers.update(windows)
        try:
            self.truncate(length)
        except BaseException:  # also Ctrl-C: half of it must not stay
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
        return {i: layer.fork() for i, layer in self.sliding.items()}

    def prepare_decode(self) -> None:
        """Size the hot sets for the sequence as it is now."""
        for layer in self.compressed.values():
            layer.rows.resize(self._cache.hot_slots(self, layer))

    def free_hot_sets(self) -> int:
        """Give back what recently fetched rows take -> bytes. No result depends on it: they are fetched again when wanted."""
        before = self.held_bytes()
        for layer in self.compressed.values():
            layer.rows.free()
        return before - self.held_bytes()

    def fork(self, cache: Owner) -> Sequence:
        """An independent copy that belongs to `cache`."""
        other = Sequence(cache)
        other.token_ids = list(self.token_ids)
        if cache.config.policy is not Policy.FULL:
            other.tier.close()
            other.tier = self.tier.fork()
        for index, layer in self.layers.items():
            other.layers[index] = forked = self._fork_layer(layer, other)
            other._hold_buffers(forked)
        if self.checkpoints is not None and isinstance(other.checkpoints, MemoryCheckpoints):
            self.checkpoints.copy_into(other.checkpoints, CHECKPOINT_FEWEST)
        return other

    def held_bytes(self) -> int:
        """Fast memory held of the budget, all pages of the sequence counted."""
        return self._read_buffers.size + sum(layer.held_bytes for layer in self.layers.values())

    def memory(self) -> MemoryUse:
        use = MemoryUse(slow=self.tier.nbytes)
        if self.checkpoints is not None:
            use.checkpoints = self.checkpoints.nbytes
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

    def _new_checkpoints(self) -> MemoryCheckpoints | None:
        windows = [window for window in self._cache.info.windows if window is not None]
        if not windows:
            return None
        on_cpu = self._cache.info.device.type == "cpu"
        return MemoryCheckpoints(Spacing.of(windows), self._cache.resources.budget if on_cpu else None)

    def _offer_checkpoint(self) -> None:
        if self.checkpoints is not None:
            with self._checkpoints_optional(self.checkpoints):
                self.checkpoints.offer(self.length, self.sliding, self._most_checkpoint_bytes())

    @contextmanager
    def _checkpoints_optional(self, checkpoints: WindowCheckpoints) -> Iterator[None]:
        """Where the system has no memory for a copy, there is none: the pass goes on."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            checkpoints.forget_pending()

    def _most_checkpoint_bytes(self) -> int:
        return self._cache.most_checkpoint_bytes(self.length)

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
