"""A device and a model small enough to compute by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from specache.config import SpeCacheConfig
from specache.model.dimensions import LayerDimensions, ModelDimensions
from specache.planning.roofline.compared_methods import Method, methods
from specache.planning.roofline.device_figures import Device, Efficiency

MODEL = ModelDimensions(
    layers=(LayerDimensions(query_heads=2, kv_heads=1, head_dim=64, window=None),),
    hidden=64,
    mlp=128,
    vocabulary=100,
    itemsize=2,
    softcap=False,
    device="cuda",
    max_positions=1 << 20,
    rope_switch=None,
    weight_bytes=1_000_000,
    read_bytes=1_000_000,
    matrix_elements=0,
)
DEVICE = Device(  # 10^9 bytes, 10^9 operations, 0.5 x 10^9 vector instructions and 10^8 bytes over the link, per second
    "hand", "by hand", 1.0, 1.0, 1e-3, 1e-3, 0.1, efficiency=Efficiency(1.0, 1.0, 1.0, 1.0, 1.0)
)


def method(key: str, **settings: Any) -> Method:
    """Return one of the methods that are compared on a GPU."""
    found = {one.key: one for one in methods(SpeCacheConfig(**settings).resolved("cuda"))}
    return found[key]


def device(**changes: Any) -> Device:
    return replace(DEVICE, **changes)
