"""Prefill of a saved session's damaged rows, over the intact rows before them.

The saved state is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specache.attention.dense import KEY_BLOCK, attend_part, merge, merge_each
from specache.cache.window_layer import WindowLayer
from specache.engine.attention_hook import attached, forward, reset_rope
from specache.errors import SessionError
from specache.kernels.torch.exact import Part
from specache.kernels.types import AttentionParams
from specache.model.info import ModelInfo
from specache.platform.budget import ByteBudget
from specache.sessions.checkpoints import DiskCheckpoints
from specache.sessions.damage import Inspection
from specache.sessions.row_blocks import RowBlocks
from specache.tiers.disk.row_layout import BLOCK_TOKENS

Blocks = dict[tuple[int, int], Tensor]  # rows [Hkv, 64, 2 D] by (layer, block)


class RereadPass:
    """The forward pass over a chunk of tokens that is prefilled again (`forward_pass.ForwardPass`).

    Args:
        rows: stored rows of the tokens before the chunk, with the damaged ones repaired.
        start: position of the chunk's first token.
        damaged: damaged blocks by full-attention layer.
        windows: the sliding-window layers at `start`, advanced by the pass. Missing ones are
            created.

    Attributes:
        blocks: the damaged blocks that the chunk covers, made again.
    """

    def __init__(
        self, info: ModelInfo, rows: RowBlocks, start: int, damaged: dict[int, list[int]], windows: dict[int, WindowLayer]
    ):
        self._info = info
        self._rows = rows
        self._start = start
        self._damaged = damaged
        self._windows = windows
        self.blocks: Blocks = {}

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        window = self._info.windows[index]
        if window is not None:
            if index not in self._windows:
                self._windows[index] = WindowLayer(index, window, keys[0], ByteBudget())
            out = self._windows[index].prefill(query[0], keys[0], values[0], params)
        else:
            self._keep_damaged(index, torch.cat([keys[0], values[0]], dim=-1))
            out, _ = merge([merge_each(self._parts(index, query[0], keys[0], values[0], params))], params.sinks)
        return out.transpose(0, 1)[None].to(query.dtype)

    def _parts(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Iterator[Part]:
        for start in range(0, self._start, KEY_BLOCK):
            stored_keys, stored_values = self._rows.read(index, start, min(start + KEY_BLOCK, self._start))
            yield attend_part(query, stored_keys.to(query.device), stored_values.to(query.device), params)
        yield attend_part(query, keys, values, params, causal=True)

    def _keep_damaged(self, index: int, rows: Tensor) -> None:
        """Add the damaged blocks among the chunk's rows [Hkv, n, 2 D] to `blocks`."""
        for block in self._damaged.get(index, ()):
            first = block * BLOCK_TOKENS - self._start
            if first >= 0 and first + BLOCK_TOKENS <= rows.shape[1]:
                self.blocks[index, block] = rows[:, first : first + BLOCK_TOKENS].cpu()


class Rereader:
    """Prefills the damaged blocks of a session's rows again.

    Args:
        found: the damage and the tokens of the session.
        checkpoints: the intact checkpoints of the sliding windows.
        chunk: tokens per forward pass.
        progress: called with the number of tokens prefilled so far.
    """

    def __init__(
        self,
        model: Any,
        info: ModelInfo,
        folder: Path,
        found: Inspection,
        checkpoints: DiskCheckpoints,
        chunk: int,
        progress: Callable[[int], None],
    ) -> None:
        assert found.token_ids is not None, "a session without its tokens is not repaired"
        self._model, self._info = model, info
        self._ids = found.token_ids
        self._damaged = found.blocks
        self._rows = RowBlocks(folder, found.manifest)
        self._checkpoints = checkpoints
        self._chunk = max(chunk // BLOCK_TOKENS, 1) * BLOCK_TOKENS
        self._progress = progress
        self._windows: dict[int, WindowLayer] = {}
        self._position = 0
        self.tokens_read = 0

    @torch.no_grad()
    def mended(self) -> Blocks:
        """Return the repaired blocks.

        Raises:
            SessionError: the keys depend on the sequence's length when they were stored.
        """
        if self._info.rope_side(len(self._ids) - 1) and self._info.rope_type == "dynamic":
            raise SessionError(
                "Rows of a model with dynamic RoPE scaling beyond its first length cannot be made again one by one: they depend on "
                "how long the sequence was. Nothing was changed. Use another copy of the session, or start again from the prompt."
            )
        reset_rope(self._model, self._info)
        with attached(self._model):
            if self._info.rope_side(len(self._ids) - 1):
                self._run_pass(len(self._ids))  # RoPE frequencies depend on the largest position of a pass
            else:
                for first, last in _runs({block for blocks in self._damaged.values() for block in blocks}):
                    self._seek(first * BLOCK_TOKENS)
                    while self._position < last * BLOCK_TOKENS:
                        self._run_pass(min(self._position // BLOCK_TOKENS * BLOCK_TOKENS + self._chunk, last * BLOCK_TOKENS))
        return self._rows.mended

    def _seek(self, start: int) -> None:
        """Move to position `start`, or to the nearest checkpoint of the windows before it."""
        if not any(window is not None for window in self._info.windows):
            self._position = start
            return
        checkpoint = self._checkpoints.newest(start)
        if checkpoint is None or min(checkpoint[0], start) <= self._position:
            return
        stored, rings = checkpoint
        self._windows = {}
        for index, ring in rings.items():
            ring = ring.to(self._info.device)
            window = WindowLayer(index, ring.shape[2], ring[0], ByteBudget())
            window.restore(ring, stored)
            window.truncate(min(stored, start))
            self._windows[index] = window
        self._position = min(stored, start)

    def _run_pass(self, stop: int) -> None:
        """Run the tokens up to position `stop` and keep the damaged blocks among their rows."""
        state = RereadPass(self._info, self._rows, self._position, self._damaged, self._windows)
        ids = torch.tensor([self._ids[self._position : stop]], dtype=torch.long, device=self._info.device)
        positions = torch.arange(self._position, stop, device=self._info.device)[None]
        forward(self._model, ids, positions, state, logits=1)
        self._rows.mended |= state.blocks
        self.tokens_read += stop - self._position
        self._position = stop
        self._progress(self.tokens_read)


def _runs(blocks: set[int]) -> Iterator[tuple[int, int]]:
    """Yield [first, last) of every run of consecutive blocks."""
    ordered = sorted(blocks)
    start = 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i] != ordered[i - 1] + 1:
            yield ordered[start], ordered[i - 1] + 1
            start = i
