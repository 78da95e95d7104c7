"""One sequence's state in every layer: what a pass changes, how it is taken back, cut and forked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from specache.attention.dense import KEY_BLOCK
from specache.cache.layers import CompressedLayer, DenseLayer
from specache.cache.resources import Resources
from specache.cache.sizes import CHECKPOINT_FEWEST, read_buffer_bytes
from specache.cache.window_checkpoints import MemoryCheckpoints, Spacing, WindowCheckpoints
from specache.cache.window_layer import WindowLayer
from specache.config import Policy, SpeCacheConfig
from specache.model.info import ModelInfo
from specache.platform.out_of_memory import is_out_of_memory
from specache.rows.fetch import Rows
from specache.stats import MemoryUse
from specache.tiers.base import SlowTier

Layer = CompressedLayer | DenseLayer | WindowLayer


class Owner(Protocol):
    """What a sequence needs of the cache that it belongs to. It does not refer to its sequences."""

    info: ModelInfo
    config: SpeCacheConfig
    resources: Resources
    living_sequences: int

    def new_tier(self) -> SlowTier:
        """An empty slow tier of the configured kind."""

    def rows(self, tier: SlowTier, index: int, keys: Tensor) -> Rows:
        """A decode step's access to the 16-bit rows of a layer with keys [Hkv, n, D]."""

    def hot_slots(self, tokens: int, layer: CompressedLayer) -> int:
        """Slots per KV head that the hot set's budget gives a layer of a sequence of so many tokens."""

    def most_checkpoint_bytes(self, tokens: int) -> int:
        """Bytes that the checkpoints of a sequence of `tokens` may take."""


class Sequence:
    """One sequence's state in every layer. Its tokens are those whose keys and values are stored.

    Attributes:
        token_ids: the stored tokens.
        prompt_tokens: how many of them were read from prompts; the ones behind were generated.
        pending_token: the token that was generated last and that nothing followed yet: it is part of the text, but its keys and
            values are not stored. `None` where everything is stored.
        finish_reason: why the last generation ended.

    A pass changes layers one after the other; `commit` makes it count. `undo_pass` takes back a decode pass wherever it stopped,
    `restore` a prefill.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.tier: SlowTier = owner.new_tier()
        self._read_buffers = owner.resources.budget.claim(0, "read buffers")
        self.checkpoints: WindowCheckpoints | None = self._new_checkpoints()
        self.layers: dict[int, Layer] = {}
        self.token_ids: list[int] = []
        self.prompt_tokens = 0
        self.pending_token: int | None = None
        self.finish_reason: str | None = None
        self._positions_before: dict[int, Tensor | None] = {}  # `next_positions` of the layers when the pass began
        self._counted = True
        owner.living_sequences += 1

    def __del__(self) -> None:
        if getattr(self, "_counted", False):
            self._owner.living_sequences -= 1

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

    def layer(self, index: int, keys: Tensor, values: Tensor | None = None) -> Layer:
        """The state of layer `index`, made when its first keys and values [Hkv, n, D] arrive: only they tell heads and dtype.

        Where the two differ, as under autocast, rows are in the model's dtype.
        """
        if index not in self.layers:
            if values is not None and values.dtype != keys.dtype:
                keys = keys[:, :0].to(self._owner.info.dtype)
            self.layers[index] = layer = self._new_layer(index, keys)
            self._hold_buffers(layer)
        return self.layers[index]

    def commit(self, token_ids: list[int]) -> None:
        """Count the tokens of a pass that is through every layer as stored."""
        self.token_ids += token_ids
        self.pending_token = None

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

    def quantise_oldest(self) -> None:
        """The pass is through every layer: what it made the residuals too long for becomes low bit."""
        for layer in self.compressed.values():
            layer.quantise_oldest()

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
        cannot go back that far, or where keys were rotated for a longer text (`ModelInfo.keeps_keys`).

        Raises:
            SlowTierError: the slow tier cannot be read; nothing changed.
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
        if 0 < length < self.length and not self._owner.info.keeps_keys(self.length - 1, length - 1):
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
        if length < self.length:
            self.pending_token = None
        del self.token_ids[length:]
        self.prompt_tokens = min(self.prompt_tokens, length)
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
        self.prompt_tokens, self.pending_token = 0, None
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
            layer.rows.resize(self._owner.hot_slots(self.length, layer))

    def free_hot_sets(self) -> int:
        """Give back what recently fetched rows take -> bytes. No result depends on it: they are fetched again when wanted."""
        before = self.held_bytes()
        for layer in self.compressed.values():
            layer.rows.free()
        return before - self.held_bytes()

    def fork(self, owner: Owner) -> Sequence:
        """An independent copy that belongs to `owner`."""
        other = Sequence(owner)
        other.token_ids = list(self.token_ids)
        other.prompt_tokens, other.pending_token = self.prompt_tokens, self.pending_token
        if owner.config.policy is not Policy.FULL:
            other.tier.close()
            other.tier = self.tier.fork()
        for index, layer in self.layers.items():
            other.layers[index] = forked = self._fork_layer(layer, other)
            other._hold_buffers(forked)
        if self.checkpoints is not None and isinstance(other.checkpoints, MemoryCheckpoints):
            self.checkpoints.copy_into(other.checkpoints, CHECKPOINT_FEWEST)
        return other

    def copy_rows(self, tier: SlowTier) -> None:
        """Write the 16-bit rows of every layer to another tier as well.

        Raises:
            SlowTierError: they cannot be read or written.
        """
        for index, layer in self.compressed.items():
            for start in range(0, layer.length, KEY_BLOCK):
                tier.write(index, start, *self.tier.read(index, start, min(start + KEY_BLOCK, layer.length)))

    def use_tier(self, tier: SlowTier) -> None:
        """Go on over a tier that holds the same rows, under the settings that the cache has now, and free the old one."""
        old, self.tier = self.tier, tier
        for index, layer in self.compressed.items():
            layer.use_tier(tier, self._owner.rows(tier, index, layer.residual_keys), self._owner.config)
        old.close()

    def count_buffers(self) -> None:
        """Hold fast memory for the rows on their way, as the cache's settings want it now.

        Raises:
            FastMemoryError: the budget has no room; what was held stays held.
        """
        config = self._owner.config
        self._read_buffers.resize(sum(read_buffer_bytes(config, layer.row_bytes) for layer in self.compressed.values()))

    def held_bytes(self) -> int:
        """Fast memory held of the budget, all pages of the sequence counted."""
        return self._read_buffers.size + sum(layer.held_bytes for layer in self.layers.values())

    def memory(self) -> MemoryUse:
        use = MemoryUse(slow=self.tier.nbytes)
        if self.checkpoints is not None:
            use.checkpoints = self.checkpoints.nbytes
        for layer in list(self.layers.values()):  # another thread may be adding some
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
        windows = [window for window in self._owner.info.windows if window is not None]
        if not windows:
            return None
        on_cpu = self._owner.info.device.type == "cpu"
        return MemoryCheckpoints(Spacing.of(windows), self._owner.resources.budget if on_cpu else None)

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
        return self._owner.most_checkpoint_bytes(self.length)

    def _hold_buffers(self, layer: Layer) -> None:
        """Take fast memory for a layer's rows on their way from and to the slow tier."""
        if isinstance(layer, CompressedLayer):
            self._read_buffers.resize(self._read_buffers.size + read_buffer_bytes(self._owner.config, layer.row_bytes))

    def _new_layer(self, index: int, keys: Tensor) -> Layer:
        window = self._owner.info.windows[index]
        if window is not None:
            return WindowLayer(index, window, keys, self._owner.resources.budget)
        if self._owner.config.policy is Policy.FULL:
            return DenseLayer(index, keys, self._owner.resources.budget)
        table = self._owner.resources.page_table(self._owner.config, keys)
        return CompressedLayer(index, self._owner.config, table, self.tier, self._owner.rows(self.tier, index, keys), keys)

    def _fork_layer(self, layer: Layer, other: Sequence) -> Layer:
        if isinstance(layer, WindowLayer | DenseLayer):
            return layer.fork()
        if other._owner.config.policy is Policy.FULL:
            dense = DenseLayer(layer.index, layer.residual_keys, other._owner.resources.budget)
            dense.extend(*self.tier.read(layer.index, 0, layer.length))
            return dense
        rows = other._owner.rows(other.tier, layer.index, layer.residual_keys)
        config = other._owner.config
        if config.layout == layer.config.layout:
            return layer.fork(other.tier, rows, config)
        table = other._owner.resources.page_table(config, layer.residual_keys)
        rebuilt = CompressedLayer(layer.index, config, table, other.tier, rows, layer.residual_keys)
        rebuilt.weights = layer.weights.fork(rebuilt.weights.tokens)
        rebuilt.rebuild(self.length)
        return rebuilt
