"""Convert a sequence's state to tensors for a save, and restore it.

pages     `pages.<layer>` uint8 [n, page bytes]: full pages of the low-bit copy, not saved before
tail      everything that changes with each token:
          `token_ids` int64 [tokens]
          `residual.<layer>` [2, Hkv, m, D]
          `rows.<layer>` [Hkv, t < 64, 2 D]: rows that are not in a block yet
          `page.<layer>` uint8 [1, page bytes]: the last page, if it is not full
          `weights.<layer>` float32 [Hkv, D]: key scales
          `queries.<layer>` float32 [Hkv, m, D]: queries that the key scales are computed from
          `wanted.<layer>` int64 [Hkv, k]: positions that the last step selected for the next
          `ring.<layer>` [2, Hkv, window, D]
tokens    `token_ids` and `weights.<layer>` again: everything else can be recomputed from them
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from specache.cache.compressed_layer import CompressedLayer
from specache.cache.sequence import Sequence
from specache.cache.sizes import page_layout
from specache.cache.window_layer import WindowLayer
from specache.config import PAGE_TOKENS
from specache.errors import SessionError
from specache.low_bit.key_scales import KeyScales
from specache.sessions.checkpoints import ring_specs
from specache.sessions.files import DAMAGED
from specache.sessions.manifest import LayerShape, Manifest, PageSpan, TailShape
from specache.sessions.snapshot import DTYPE_NAMES, Snapshot, TensorSpec
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.disk.row_layout import BLOCK_TOKENS


def shapes(sequence: Sequence) -> dict[int, LayerShape]:
    """Return the shapes of a sequence's layers."""
    return {index: _shape(layer) for index, layer in sorted(sequence.layers.items())}


def tail_shapes(sequence: Sequence) -> dict[int, TailShape]:
    """Return which optional tensors `tail_tensors` has, by full-attention layer."""
    found = {}
    for index, layer in sequence.compressed.items():
        counts = (None if t is None else t.shape[1] for t in (layer.key_scales.observed, layer.next_positions))
        found[index] = TailShape(layer.key_scales.value is not None, *counts)
    return found


def page_tensors(sequence: Sequence, start: int, stop: int) -> dict[str, TensorSpec]:
    """Return the full pages `[start, stop)` of every full-attention layer."""

    def raw(layer: CompressedLayer) -> TensorSpec:
        shape = (stop - start, layer.table.pool.layout.page_bytes)
        return TensorSpec(torch.uint8, shape, lambda: layer.table.raw(start, stop))

    return {f"pages.{index}": raw(layer) for index, layer in sequence.compressed.items()}


def tail_tensors(sequence: Sequence, tier: DiskTier) -> dict[str, TensorSpec]:
    """Return everything of the state beside full pages and blocks."""
    tensors = {"token_ids": torch.tensor(sequence.token_ids, dtype=torch.int64)}
    rows = tier.tails()
    for index, layer in sequence.compressed.items():
        tensors[f"residual.{index}"] = torch.stack([layer.residual_keys, layer.residual_values])
        tensors[f"rows.{index}"] = rows[index]
        whole = layer.table.length // PAGE_TOKENS
        if layer.table.length % PAGE_TOKENS:
            tensors[f"page.{index}"] = layer.table.raw(whole, whole + 1)
        if layer.key_scales.value is not None:
            tensors[f"weights.{index}"] = layer.key_scales.value
        if layer.key_scales.observed is not None:
            tensors[f"queries.{index}"] = layer.key_scales.observed
        if layer.next_positions is not None:
            tensors[f"wanted.{index}"] = layer.next_positions
    for index, other in sorted(sequence.layers.items()):
        if isinstance(other, WindowLayer):
            tensors[f"ring.{index}"] = other.ring
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def ring_tokens(sequence: Sequence) -> int | None:
    """Return `WindowLayer.written` of the sliding layers; `None` if it is the length."""
    written = max((layer.written for layer in sequence.sliding.values()), default=sequence.length)
    return written if written > sequence.length else None


def token_part(tail: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the tensors of a tail that everything else can be recomputed from."""
    return {name: spec for name, spec in tail.items() if name.partition(".")[0] in ("token_ids", "weights")}


def token_specs(manifest: Manifest) -> dict[str, TensorSpec]:
    """Return the specs of the `token_part` of a tail."""
    return token_part(tail_specs(manifest))


def open_tail(folder: Path, manifest: Manifest) -> Snapshot:
    """Open the tail of a state that has tokens.

    Raises:
        SessionError: its file is damaged.
    """
    assert manifest.tail is not None
    return Snapshot(folder / manifest.tail, manifest.files[manifest.tail], tail_specs(manifest))


def open_tier(folder: Path, manifest: Manifest, tail: Snapshot) -> DiskTier:
    """Open the rows of a state.

    Raises:
        SessionError: the tail is damaged.
        SlowTierError: a file of rows is missing or too short.
    """
    rows = tail.read(f"rows.{index}" for index in manifest.full_layers)
    return DiskTier.open(folder, manifest.rows, {index: rows[f"rows.{index}"] for index in manifest.full_layers})


def restore(sequence: Sequence, device: torch.device, folder: Path, manifest: Manifest, tail: Snapshot) -> None:
    """Fill an empty sequence that already has the state's tier.

    Raises:
        SessionError: a file is damaged.
        FastMemoryError: the state does not fit into the cache's budget.
    """
    names, low_bit = list(tail_specs(manifest)), manifest.low_bit_tokens
    for index, shape in manifest.layers.items():
        layer = sequence.layer(index, torch.empty(shape.heads, 0, shape.dim, dtype=DTYPE_NAMES[shape.dtype], device=device))
        saved = {name.partition(".")[0]: name for name in names if name.endswith(f".{index}")}
        tensors = {kind: tensor.to(device) for kind, tensor in _by_kind(tail, saved).items()}
        if isinstance(layer, WindowLayer):
            layer.restore(tensors["ring"], manifest.tokens, manifest.ring_tokens)
        elif isinstance(layer, CompressedLayer):
            layer.table.extend(low_bit)
            if "page" in tensors:
                layer.table.set_raw(low_bit // PAGE_TOKENS, tensors["page"])
            weights = KeyScales(layer.key_scales.tokens, tensors.get("weights"), tensors.get("queries"))
            layer.restore(tensors["residual"], weights, _checked_positions(tensors.get("wanted"), low_bit))
    _restore_pages(sequence.compressed, folder, manifest)
    sequence.commit(tail.read(["token_ids"])["token_ids"].tolist())
    restore_history(sequence, manifest)


def restore_history(sequence: Sequence, manifest: Manifest) -> None:
    """Set what a sequence knows of its past from the manifest: finish reason, counts, ..."""
    sequence.finish_reason = manifest.finish_reason
    sequence.prompt_tokens = manifest.tokens if manifest.prompt_tokens is None else manifest.prompt_tokens
    sequence.pending_token = manifest.pending_token
    sequence.decode_steps, sequence.compiled_steps = manifest.decode_steps or 0, manifest.compiled_steps or 0


def check_shapes(manifest: Manifest, expected: Mapping[int, tuple[int, int, int | None]], dtype: torch.dtype) -> None:
    """Check that the state's layers are those of the model.

    Args:
        expected: per layer its `Hkv`, `D` and window.

    Raises:
        SessionError: they differ.
    """
    found = {index: (shape.heads, shape.dim, shape.window) for index, shape in manifest.layers.items()}
    if found and (found != dict(expected) or any(DTYPE_NAMES[shape.dtype] != dtype for shape in manifest.layers.values())):
        raise SessionError(f"The session's layers are not those of the model. {DAMAGED}")


def check_snapshots(folder: Path, manifest: Manifest) -> None:
    """Check that the snapshots of pages and windows hold the expected tensors.

    Raises:
        SessionError: one does not.
    """
    for span in manifest.pages:
        _pages(folder, manifest, span)
    for checkpoint in manifest.checkpoints:
        Snapshot(folder / checkpoint.file, manifest.files[checkpoint.file], ring_specs(manifest))


def restore_span(
    layers: Mapping[int, CompressedLayer], folder: Path, manifest: Manifest, span: PageSpan, start: int, count: int
) -> None:
    """Restore the first `count` pages of a span, from page `start` of every layer on.

    Raises:
        SessionError: the span's file is damaged.
    """
    snapshot = _pages(folder, manifest, span)
    for index, layer in layers.items():
        layer.table.set_raw(start, snapshot.read([f"pages.{index}"])[f"pages.{index}"][:count])


def _restore_pages(layers: Mapping[int, CompressedLayer], folder: Path, manifest: Manifest) -> None:
    start = 0
    for span in manifest.pages:
        restore_span(layers, folder, manifest, span, start, span.count)
        start += span.count
    for layer in layers.values():
        layer.table.mark()


def _pages(folder: Path, manifest: Manifest, span: PageSpan) -> Snapshot:
    specs = {f"pages.{i}": TensorSpec(torch.uint8, (span.stored, _page_bytes(manifest, i))) for i in manifest.full_layers}
    return Snapshot(folder / span.file, manifest.files[span.file], specs)


def _by_kind(tail: Snapshot, names: Mapping[str, str]) -> dict[str, Tensor]:
    tensors = tail.read(names.values())
    return {kind: tensors[name] for kind, name in names.items()}


def tail_specs(manifest: Manifest) -> dict[str, TensorSpec]:
    specs = {"token_ids": TensorSpec(torch.int64, (manifest.tokens,)), **ring_specs(manifest)}
    low_bit = manifest.low_bit_tokens
    for index, shape in manifest.full_layers.items():
        heads, dim, dtype = shape.heads, shape.dim, DTYPE_NAMES[shape.dtype]
        tail, blocks = manifest.tails[index], sum(extent.count for extent in manifest.rows[index])
        specs[f"residual.{index}"] = TensorSpec(dtype, (2, heads, manifest.tokens - low_bit, dim))
        specs[f"rows.{index}"] = TensorSpec(dtype, (heads, manifest.tokens - blocks * BLOCK_TOKENS, 2 * dim))
        if low_bit % PAGE_TOKENS:
            specs[f"page.{index}"] = TensorSpec(torch.uint8, (1, _page_bytes(manifest, index)))
        if tail.weights:
            specs[f"weights.{index}"] = TensorSpec(torch.float32, (heads, dim))
        if tail.queries is not None:
            specs[f"queries.{index}"] = TensorSpec(torch.float32, (heads, tail.queries, dim))
        if tail.wanted is not None:
            specs[f"wanted.{index}"] = TensorSpec(torch.int64, (heads, tail.wanted))
    return specs


def _checked_positions(wanted: Tensor | None, low_bit: int) -> Tensor | None:
    """Return the positions that the next step may fetch: inside the low-bit copy, or -1."""
    if wanted is not None and wanted.numel() and not -1 <= int(wanted.min()) <= int(wanted.max()) < low_bit:
        raise SessionError(f"The session's tail names tokens that are not there. {DAMAGED}")
    return wanted


def _page_bytes(manifest: Manifest, layer: int) -> int:
    config, shape = manifest.config("."), manifest.layers[layer]
    return page_layout(config, shape.heads, shape.dim).page_bytes


def _shape(layer: object) -> LayerShape:
    if isinstance(layer, WindowLayer):
        _, heads, window, dim = layer.ring.shape
        return LayerShape(heads, dim, str(layer.ring.dtype).removeprefix("torch."), window)
    assert isinstance(layer, CompressedLayer), "policy 'full' has no sessions"
    heads, _, dim = layer.residual_keys.shape
    return LayerShape(heads, dim, str(layer.residual_keys.dtype).removeprefix("torch."), None)
