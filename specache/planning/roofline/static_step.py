"""Compute the device memory of a decode step over static buffers, which only this library's methods
on a GPU use.
"""

from __future__ import annotations

from specache.cache.sizes import hot_slots
from specache.config import SpeCacheConfig
from specache.device.device_hot_set import hot_set_bytes
from specache.device.static_sizes import KINDS, batch_bytes, low_bit_room, step_pairs, unsupported_reason
from specache.model.dimensions import ModelDimensions, row_bytes
from specache.planning.footprint import CacheFootprint, PlannedSequence


def static_step_bytes(model: ModelDimensions, config: SpeCacheConfig, context: int, batch: int) -> int:
    """Return the bytes that `batch` sequences of `context` tokens hold on a GPU beyond the ordinary
    step.

    They are the batch's static buffers, and the excess of a device's hot set over a host's. Return
    0 if the ordinary step decodes these sequences. The temporary tensors of a captured graph are in
    the plan's working set; PyTorch's rounding is not counted.
    """
    if unsupported_reason(config, model.dynamic_rope) or context < config.residual + config.group_size:
        return 0
    room = low_bit_room(config, context)
    top_k = step_pairs(config, room)
    shapes = [(layer.kv_heads, layer.head_dim) for layer in model.full_layers]
    windows = len(model.layers) - len(shapes)
    total = batch_bytes(shapes, windows, batch, top_k, room, KINDS[config.policy].queries, model.itemsize)
    for heads, dim in shapes if top_k else ():
        slots = max(hot_slots(model, config, heads, dim, context, batch), top_k)
        total += hot_set_bytes(batch, heads, slots, room, row_bytes(1, dim, model.itemsize))
    ordinary = CacheFootprint(model, config, batch, top_k).first_step(PlannedSequence(context)).hot_set
    return total - batch * ordinary
