"""The workload of whole-model benchmarks: a model, a batch, a context, and their memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from specache.bench.synthetic import LayerShape, synthetic_rows
from specache.cache.sizes import ordinary_bytes, page_layout
from specache.config import PAGE_TOKENS, SpeCacheConfig
from specache.engine.attention_hook import attached, forward
from specache.kernels.types import AttentionParams
from specache.model.dimensions import ModelDimensions, dimensions_of, row_bytes
from specache.model.info import inspect_model


@dataclass
class Workload:
    """`batch` sequences of `context` synthetic tokens, to be decoded by `model`.

    Layers of one shape hold equal values, each in memory of its own.
    """

    model: Any
    batch: int
    context: int
    seed: int = 0
    layer_shapes: list[LayerShape] = field(init=False)

    def __post_init__(self) -> None:
        self.info = inspect_model(self.model)
        self.layer_shapes = layer_shapes(self.model)
        self._rows: dict[LayerShape, tuple[Tensor, Tensor]] = {}

    @cached_property
    def dimensions(self) -> ModelDimensions:
        """Return the model's dimensions, with the weights that a step reads."""
        return dimensions_of(self.model, self.info)

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def rows(self, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [Hkv, S, D] of a layer."""
        shape = self.layer_shapes[index]
        if shape not in self._rows:
            heads, dim = shape
            self._rows[shape] = synthetic_rows(heads, self.context, dim, self.info.dtype, self.seed, self.info.device)
        return self._rows[shape]

    def drop_rows(self) -> None:
        """Free the rows that were drawn. They are drawn again on demand."""
        self._rows.clear()

    @property
    def drawn_bytes(self) -> int:
        """Return the bytes of the rows once every layer shape was drawn."""
        return sum(row_bytes(heads, dim, self.info.dtype.itemsize) for heads, dim in set(self.layer_shapes)) * self.context

    @property
    def exact_bytes(self) -> int:
        """Return the bytes of an ordinary cache of the whole batch in the model's dtype."""
        return self.batch * ordinary_bytes(self.dimensions, self.context, self.info.dtype.itemsize)

    def copy_bytes(self, config: SpeCacheConfig) -> int:
        """Return the bytes of the low-bit copies."""
        pages = math.ceil(self.context / PAGE_TOKENS)
        layouts = [page_layout(config, heads, dim) for heads, dim in self.layer_shapes]
        full = [layout for layout, window in zip(layouts, self.info.windows, strict=True) if window is None]
        return sum(layout.page_bytes for layout in full) * pages * self.batch


@torch.no_grad()
def layer_shapes(model: Any) -> list[LayerShape]:
    """Return (KV heads, head dimension) of every layer, as its tensors show in a forward pass."""
    probe = _Probe()
    first = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with attached(model):
        forward(model, first, first, probe, logits=1)
    return [probe.shapes[index] for index in sorted(probe.shapes)]


class _Probe:
    """A pass that only records shapes (see `forward_pass.ForwardPass`)."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        self.shapes[index] = (keys.shape[1], keys.shape[3])
        return torch.zeros_like(query.transpose(1, 2))
