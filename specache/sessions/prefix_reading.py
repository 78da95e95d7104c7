"""Bring the first tokens of a stored prefix back into a cache.

Pages, key scales and sliding windows are copied; the residual is read from the rows. The rows stay
in their files where the cache's rows are on the same disk, and are read into its tier otherwise.
All of them are verified once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from specache.attention.dense import KEY_BLOCK
from specache.cache.prefix_fork import begin_anew
from specache.cache.sequence import Sequence
from specache.cache.sizes import CHECKPOINT_FEWEST
from specache.cache.window_checkpoints import MemoryCheckpoints, Spacing
from specache.cache.window_layer import WindowLayer
from specache.config import Policy
from specache.errors import SessionError, SlowTierError
from specache.low_bit.key_scales import KeyScales
from specache.sessions import state
from specache.sessions.checkpoints import DiskCheckpoints
from specache.sessions.prefix_files import SavedPrefix
from specache.sessions.snapshot import DTYPE_NAMES, Snapshot
from specache.tiers.base import SlowTier
from specache.tiers.disk.disk_tier import DiskTier


class NoRoomError(Exception):
    """The slow tier of a cache has no room for the rows of a prefix, which is as it was."""


def read_pieces(saved: SavedPrefix, sequence: Sequence, length: int) -> Iterator[None]:
    """Fill an empty sequence with the first `length` tokens of a prefix. Yield after each piece.

    A piece is `KEY_BLOCK` rows of a layer, or the pages of one file. `saved.kept(length)` must be
    `length`. The sequence is empty again after an error, or if the iterator is closed early.

    Raises:
        SessionError, SlowTierError: a file is damaged or gone.
        NoRoomError: the cache's slow tier cannot store the rows.
        FastMemoryError: the cache's budget has no room.
    """
    device, policy = sequence.context.info.device, sequence.context.config.policy
    assert policy is not Policy.FULL, "its caches have no rows that a prefix could bring back"
    folder, manifest = saved.folder, saved.manifest
    try:
        tail = state.open_tail(folder, manifest)
        files = state.open_tier(folder, manifest, tail)
        saved.read_by(files.files())
        try:
            for layer in manifest.full_layers:
                files.truncate(layer, length)
            yield from _bring_rows(sequence, files, saved, length, device)
        finally:
            files.close()
        for index, shape in manifest.layers.items():
            empty = torch.empty(shape.heads, 0, shape.dim, dtype=DTYPE_NAMES[shape.dtype], device=device)
            sequence.layer(index, empty)
        yield from _restore_low_bit(sequence, saved, tail, length, device)
        _restore_windows(sequence, saved, tail, length, device)
        sequence.commit(saved.text[:length].tolist())
        begin_anew(sequence)
    except BaseException:
        sequence.clear()
        raise


def _bring_rows(sequence: Sequence, files: DiskTier, saved: SavedPrefix, length: int, device: torch.device) -> Iterator[None]:
    """Fill the sequence's tier with the first rows of `files`, or share them."""
    tier, layers = sequence.tier, saved.manifest.full_layers
    share = isinstance(tier, DiskTier) and os.stat(tier.folder).st_dev == os.stat(files.folder).st_dev
    for layer in layers:
        for start in () if share and length <= saved.intact_tokens else range(0, length, KEY_BLOCK):
            keys, values = files.read(layer, start, min(start + KEY_BLOCK, length))
            if not share:
                _write(tier, layer, start, keys.to(device), values.to(device))
            yield
    saved.intact_tokens = max(saved.intact_tokens, length)
    if isinstance(tier, DiskTier) and share:
        sequence.tier = files.fork(tier.folder)
        tier.close()


def _write(tier: SlowTier, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
    """Write rows. Where there is no room for them, that is no damage of the prefix."""
    try:
        tier.write(layer, start, keys, values)
    except SlowTierError as error:
        raise NoRoomError(str(error)) from error


def _restore_low_bit(sequence: Sequence, saved: SavedPrefix, tail: Snapshot, length: int, device: torch.device) -> Iterator[None]:
    """Restore pages, key scales and residual of every full-attention layer."""
    manifest, layers = saved.manifest, sequence.compressed
    for layer in layers.values():
        layer.table.extend(layer.config.low_bit_length(length))
    pages = max(len(layer.table.pages) for layer in layers.values())
    start = 0
    for span in manifest.pages:
        count = min(span.count, pages - start)
        if count > 0:
            state.restore_span(layers, saved.folder, manifest, span, start, count)
            yield
        start += span.count
    for index, layer in layers.items():
        if start < pages:  # the last page is not full
            layer.table.set_raw(start, tail.read([f"page.{index}"])[f"page.{index}"].to(device))
        residual = torch.stack(sequence.tier.read(index, layer.table.length, length)).to(device)
        weights = tail.read([f"weights.{index}"])[f"weights.{index}"].to(device)
        layer.restore(residual, KeyScales(layer.key_scales.tokens, weights), None)


def _restore_windows(sequence: Sequence, saved: SavedPrefix, tail: Snapshot, length: int, device: torch.device) -> None:
    """Restore the sliding windows from the end of the prefix, or from a checkpoint."""
    windows = sequence.sliding
    if not windows:
        return
    whole = len(saved.text)
    spacing = Spacing.of(layer.window for layer in windows.values())
    checkpoints = DiskCheckpoints(spacing, saved.folder, saved.manifest)
    if all(_serves(layer, whole, length) for layer in windows.values()):
        stored, rings = whole, {index: tail.read([f"ring.{index}"])[f"ring.{index}"] for index in windows}
    else:
        best = spacing.best(checkpoints.lengths, length)
        if best is None:
            raise SessionError(f"{saved.folder} has no checkpoint of the sliding windows for {length:,} tokens.")
        stored = checkpoints.lengths[best]
        rings = checkpoints.rings(stored)
    for index, layer in windows.items():
        layer.restore(rings[index].to(device), stored)
        layer.truncate(length)
    if isinstance(sequence.checkpoints, MemoryCheckpoints):
        checkpoints.forget_after(length)
        checkpoints.copy_into(sequence.checkpoints, CHECKPOINT_FEWEST)


def _serves(layer: WindowLayer, whole: int, length: int) -> bool:
    """Return whether the ring of `whole` tokens serves a sequence of `length`."""
    return length >= whole - 1 or whole <= layer.window
