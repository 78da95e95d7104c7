"""One sequence's state in every layer: changed by passes, undone, truncated and forked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from specache.attention.dense import KEY_BLOCK
from specache.cache.cache_context import CacheContext
from specache.cache.compressed_layer import CompressedLayer
from specache.cache.dense_layer import DenseLayer
from specache.cache.sizes import CHECKPOINT_FEWEST
from specache.cache.window_checkpoints import MemoryCheckpoints, Spacing, WindowCheckpoints
from specache.cache.window_layer import WindowLayer
from specache.config import Policy
from specache.platform.out_of_memory import is_out_of_memory
from specache.stats import MemoryUse
from specache.tiers.base import SlowTier
from specache.tiers.ram import RamTier

Layer = CompressedLayer | DenseLayer | WindowLayer


class Sequence:
    """One sequence's state in every layer. Its tokens are those whose keys and values are stored.

    Attributes:
        token_ids: the stored tokens.
        prompt_tokens: how many of them were prefilled from prompts; the rest was generated.
        pending_token: the last generated token while its keys and values are not stored yet,
            although it is part of the text. `None` where everything is stored.
        finish_reason: why the last generation ended.
        decode_steps, compiled_steps: steps that decoded it so far, and those that ran compiled.

    A pass changes one layer after the other, and `commit` completes it. `undo_pass` undoes a decode
    pass wherever it stopped; `restore` undoes a prefill.
    """

    def __init__(self, context: CacheContext) -> None:
        self._context = context
        self.tier: SlowTier = context.new_tier()
        self.checkpoints: WindowCheckpoints | None = self._new_checkpoints()
        self.layers: dict[int, Layer] = {}
        self.token_ids: list[int] = []
        self.prompt_tokens = 0
        self.pending_token: int | None = None
        self.finish_reason: str | None = None
        self.decode_steps = self.compiled_steps = 0
        self._positions_before: dict[int, Tensor | None] = {}  # layers' `next_positions` before the pass
        self._counted = True
        context.living_sequences += 1

    def __del__(self) -> None:
        if getattr(self, "_counted", False):
            self._context.living_sequences -= 1

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def context(self) -> CacheContext:
        """The context of the cache that it belongs to."""
        return self._context

    @property
    def compressed(self) -> dict[int, CompressedLayer]:
        """The full-attention layers by number; empty under policy `full`."""
        return {index: layer for index, layer in sorted(self.layers.items()) if isinstance(layer, CompressedLayer)}

    @property
    def sliding(self) -> dict[int, WindowLayer]:
        """The sliding-window layers by number."""
        return {index: layer for index, layer in sorted(self.layers.items()) if isinstance(layer, WindowLayer)}

    def layer(self, index: int, keys: Tensor, values: Tensor | None = None) -> Layer:
        """Return the state of layer `index`. Create it from its first keys and values [Hkv, n, D].

        They determine heads and dtype. Where their dtypes differ, as under autocast, the model's is
        used.
        """
        if index not in self.layers:
            if values is not None and values.dtype != keys.dtype:
                keys = keys[:, :0].to(self._context.info.dtype)
            self.layers[index] = self._new_layer(index, keys)
        return self.layers[index]

    def commit(self, token_ids: list[int]) -> None:
        """Count the tokens of a pass as stored, after it has finished in every layer."""
        self.token_ids += token_ids
        self.pending_token = None

    def begin_prefill(self) -> None:
        """Checkpoint the windows before a request changes them."""
        self._offer_checkpoint()

    def begin_chunk(self, stop: int, total: int) -> None:
        """Prepare checkpoints for a pass that prefills a prompt of `total` tokens up to `stop`."""
        if self.checkpoints is not None:
            self.checkpoints.begin(self.length, stop, total)

    def capture_window(self, layer: WindowLayer, keys: Tensor, values: Tensor) -> None:
        """Capture a sliding layer's due checkpoints before it stores a chunk's keys and values.

        keys, values: [Hkv, n, D].
        """
        if self.checkpoints is not None:
            with self._checkpoints_optional(self.checkpoints):
                self.checkpoints.capture(layer, keys, values)

    def end_chunk(self) -> None:
        """Keep the checkpoints of a prompt's chunk, after it has finished in every layer."""
        if self.checkpoints is not None:
            self.checkpoints.end(self.length, self._context.most_checkpoint_bytes(self.length))

    def end_step(self, compiled: bool = False) -> None:
        """Count a decode step that has finished in every layer, and checkpoint windows if due."""
        self.decode_steps += 1
        self.compiled_steps += compiled
        if self.checkpoints is not None and self.checkpoints.spacing.due_in_answer(self.length):
            self._offer_checkpoint()

    def begin_pass(self) -> None:
        """Record what `undo_pass` needs."""
        self._positions_before = {i: layer.next_positions for i, layer in self.compressed.items()}

    def quantise_oldest(self) -> None:
        """Quantise the pending groups of all layers, after the pass has finished in every layer."""
        for layer in self.compressed.values():
            layer.quantise_oldest()

    def undo_pass(self) -> None:
        """Undo a decode pass that did not finish. Clear the sequence if that fails too.

        It raises nothing: the caller raises the error that made the pass fail.
        """
        try:
            for index, layer in self.layers.items():
                if isinstance(layer, CompressedLayer):
                    layer.undo(self.length, self._positions_before[index])
                elif isinstance(layer, WindowLayer):
                    layer.undo(self.length)
                else:
                    layer.truncate(self.length)
        except BaseException:  # also Ctrl-C: a half-undone state must not stay
            self.clear()

    def can_truncate(self, length: int) -> bool:
        """Return whether every layer can go back to `length` tokens without a new prefill."""
        return all(layer.can_truncate(length) for layer in self.layers.values())

    def truncated_length(self, length: int) -> int:
        """Return how many tokens `truncate(length)` would keep. Nothing changes."""
        length = min(length, self.length)
        if not self.can_truncate(length):
            length = 0 if self.checkpoints is None else self.checkpoints.reach(length)
        if not all(layer.can_truncate(length) for layer in self.compressed.values()):
            return 0
        if 0 < length < self.length and not self._context.info.keeps_keys(self.length - 1, length - 1):
            return 0
        return length

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens, or fewer.

        Fewer stay where the sliding windows must go back to a checkpoint. None stay where a layer
        cannot go back that far, or where keys were rotated for a longer text
        (`ModelInfo.keeps_keys`).

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
        if 0 < length < self.length and not self._context.info.keeps_keys(self.length - 1, length - 1):
            return self.clear()
        # read all residuals before anything changes
        residuals = {i: layer.residual_at(length) for i, layer in self.compressed.items()}
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
        """Go back to `length` tokens after a prefill failed. Clear the sequence if that fails too.

        It raises nothing: the caller raises the error that made the prefill fail.
        """
        if length == 0:
            return self.clear()
        self.layers.update(windows)
        try:
            self.truncate(length)
        except BaseException:  # also Ctrl-C: a half-restored state must not stay
            self.clear()

    def clear(self) -> None:
        """Drop all tokens and free their memory."""
        for layer in self.layers.values():
            layer.release()
        self.layers.clear()
        self.token_ids.clear()
        self.prompt_tokens, self.pending_token = 0, None
        self.decode_steps = self.compiled_steps = 0
        if self.checkpoints is not None:
            self.checkpoints.forget_after(0)
        self.tier.close()

    def windows(self) -> dict[int, WindowLayer]:
        """Return copies of the sliding layers, for `restore`."""
        return {i: layer.fork() for i, layer in self.sliding.items()}

    def store_random(self, tokens: int) -> None:
        """Store random keys and values in every layer, as a text of so many tokens would, for
        timing.

        Raises:
            FastMemoryError: the budget has no room.
        """
        for layer in self.layers.values():
            rows = layer.random_rows(tokens)
            if isinstance(layer, DenseLayer):
                layer.extend(rows, rows)
            else:
                layer.store(rows, rows)
        self.commit([0] * tokens)

    def prepare_decode(self) -> None:
        """Resize the hot sets for the current length."""
        for layer in self.compressed.values():
            layer.row_fetcher.resize(self._context.hot_slots(self.length, layer))

    def free_hot_sets(self) -> int:
        """Free the hot sets -> bytes. Results do not change: rows are fetched again when needed."""
        before = self.held_bytes()
        for layer in self.compressed.values():
            layer.row_fetcher.free()
        return before - self.held_bytes()

    def set_aside(self) -> None:
        """Keep the sequence without decoding it: free its hot sets, and no longer divide theirs by
        it.

        A fork of it decodes as usual.
        """
        self.free_hot_sets()
        if self._counted:
            self._counted = False
            self._context.living_sequences -= 1

    def fork(self, context: CacheContext) -> Sequence:
        """Return an independent copy that belongs to the cache of `context`.

        Raises:
            FastMemoryError, SlowTierError: there is no room; nothing is held.
        """
        other = Sequence(context)
        try:
            self._copy_into(other)
        except BaseException:
            other.clear()  # the error's traceback would keep it
            raise
        return other

    def copy_rows(self, tier: SlowTier) -> None:
        """Store the 16-bit rows of every layer in another tier; within main memory both share them.

        Raises:
            SlowTierError: they cannot be read or written.
        """
        if isinstance(tier, RamTier) and isinstance(self.tier, RamTier):
            return tier.share(self.tier)
        for index, layer in self.compressed.items():
            for start in range(0, layer.length, KEY_BLOCK):
                tier.write(index, start, *self.tier.read(index, start, min(start + KEY_BLOCK, layer.length)))

    def use_tier(self, tier: SlowTier) -> None:
        """Switch to a tier with the same rows, under the cache's settings. Close the old one."""
        old, self.tier = self.tier, tier
        for index, layer in self.compressed.items():
            layer.use_tier(tier, self._context.row_fetcher(tier, index, layer.residual_keys), self._context.config)
        old.close()

    def claim_buffers(self) -> None:
        """Claim fast memory for the read buffers that the cache's current settings need.

        Raises:
            FastMemoryError: the budget has no room.
        """
        for layer in self.compressed.values():
            layer.claim_buffers(self._context.config)

    def held_bytes(self) -> int:
        """Return the fast memory held of the budget, in bytes. Shared pages are counted in full."""
        return sum(layer.held_bytes for layer in self.layers.values())

    @property
    def dense_bytes(self) -> int:
        """The bytes that its layers of policy `full` hold of the budget."""
        return sum(layer.held_bytes for layer in self.layers.values() if isinstance(layer, DenseLayer))

    def memory(self, itemsize: int | None = None) -> MemoryUse:
        """Return the bytes in use, with row elements of `itemsize` bytes (default: the model's).

        Rows that are shared with forks count in full.
        """
        checkpoints = 0 if self.checkpoints is None else self.checkpoints.nbytes
        layers = list(self.layers.values())  # another thread may be adding some
        return sum((layer.memory(itemsize) for layer in layers), MemoryUse(slow=self.tier.nbytes, checkpoints=checkpoints))

    def _copy_into(self, other: Sequence) -> None:
        other.token_ids = list(self.token_ids)
        other.prompt_tokens, other.pending_token = self.prompt_tokens, self.pending_token
        other.decode_steps, other.compiled_steps = self.decode_steps, self.compiled_steps
        if other._context.config.policy is not Policy.FULL:
            other.tier.close()
            other.tier = self.tier.fork()
        for index, layer in self.layers.items():
            other.layers[index] = self._fork_layer(layer, other)
        if self.checkpoints is not None and isinstance(other.checkpoints, MemoryCheckpoints):
            self.checkpoints.copy_into(other.checkpoints, CHECKPOINT_FEWEST)

    def _new_checkpoints(self) -> MemoryCheckpoints | None:
        windows = [window for window in self._context.info.windows if window is not None]
        if not windows:
            return None
        on_cpu = self._context.info.device.type == "cpu"
        return MemoryCheckpoints(Spacing.of(windows), self._context.resources.budget if on_cpu else None)

    def _offer_checkpoint(self) -> None:
        if self.checkpoints is not None:
            with self._checkpoints_optional(self.checkpoints):
                self.checkpoints.offer(self.length, self.sliding, self._context.most_checkpoint_bytes(self.length))

    @contextmanager
    def _checkpoints_optional(self, checkpoints: WindowCheckpoints) -> Iterator[None]:
        """Skip a checkpoint for which the system has no memory, and go on with the pass."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            checkpoints.forget_pending()

    def _new_layer(self, index: int, keys: Tensor) -> Layer:
        context = self._context
        window = context.info.windows[index]
        if window is not None:
            return WindowLayer(index, window, keys, context.resources.budget)
        if context.config.policy is Policy.FULL:
            return DenseLayer(index, keys, context.resources.budget)
        table = context.resources.page_table(context.config, keys)
        return CompressedLayer(index, context.config, table, self.tier, context.row_fetcher(self.tier, index, keys), keys)

    def _fork_layer(self, layer: Layer, other: Sequence) -> Layer:
        if isinstance(layer, WindowLayer | DenseLayer):
            return layer.fork()
        context, config = other._context, other._context.config
        if config.policy is Policy.FULL:
            dense = DenseLayer(layer.index, layer.residual_keys, context.resources.budget)
            dense.extend(*self.tier.read(layer.index, 0, layer.length))
            return dense
        row_fetcher = context.row_fetcher(other.tier, layer.index, layer.residual_keys)
        if config.layout == layer.config.layout:
            return layer.fork(other.tier, row_fetcher, config)
        table = context.resources.page_table(config, layer.residual_keys)
        rebuilt = CompressedLayer(layer.index, config, table, other.tier, row_fetcher, layer.residual_keys)
        rebuilt.key_scales = layer.key_scales.fork(rebuilt.key_scales.tokens)
        rebuilt.claim_buffers(config)
        rebuilt.rebuild(self.length)
        return rebuilt
