"""Compute the device memory of a decode step over static buffers, which only this library's methods
on a GPU use.
"""

from __future__ import annotations

from specache.cache.sizes import hot_slots
from specache.config import SlowTierKind, SpeCacheConfig
from specache.device.device_hot_set import hot_set_bytes
from specache.device.static_sizes import KINDS, batch_bytes, low_bit_room
from specache.model.dimensions import ModelDimensions
from specache.planning.footprint import CacheFootprint, PlannedSequence
from specache.planning.roofline.compared_methods import Method
from specache.planning.roofline.kernel_costs import THIS_LIBRARY


def method_static_bytes(model: ModelDimensions, method: Method, context: int, batch: int) -> int:
    """Return a method's `static_step_bytes`; 0 for methods that run on other kernels."""
    return static_step_bytes(model, method.config, context, batch) if method.kernels is THIS_LIBRARY else 0


def static_step_bytes(model: ModelDimensions, config: SpeCacheConfig, context: int, batch: int) -> int:
    """Return the bytes that `batch` sequences of `context` tokens hold on a GPU beyond the ordinary
    step.

    They are the batch's static buffers, and the excess of a device's hot set over a host's. Return
    0 if the ordinary step decodes these sequences. The temporary tensors of a captured graph are in
    the plan's working set; PyTorch's rounding is not counted.
    """
    supported = config.policy in KINDS and config.slow_tier is SlowTierKind.RAM
    short = context < config.residual + config.group_size
    if not supported or short or config.residual == 0 or model.dynamic_rope:
        return 0
    room = low_bit_room(config, context)
    top_k = min(config.top_k, room) if config.policy.fetches else 0
    shapes = [(layer.kv_heads, layer.head_dim) for layer in model.full_layers]
    windows = len(model.layers) - len(shapes)
    total = batch_bytes(shapes, windows, batch, top_k, room, KINDS[config.policy].queries, model.itemsize)
    for heads, dim in shapes if top_k else ():
        slots = max(hot_slots(model, config, heads, dim, context, batch), top_k)
        total += hot_set_bytes(batch, heads, slots, room, 2 * dim * model.itemsize)
    ordinary = CacheFootprint(model, config, batch, top_k).first_step(PlannedSequence(context)).hot_set
    return total - batch * ordinary
