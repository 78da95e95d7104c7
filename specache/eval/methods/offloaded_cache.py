"""transformers' own offloaded cache: all layers in main memory, the next one copied to the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import DynamicCache

from specache.cache.sizes import ORDINARY_ITEMSIZE
from specache.engine.attention_hook import reset_rope
from specache.errors import MethodUnavailableError
from specache.eval.methods.base import Method
from specache.eval.methods.stock import StockSession
from specache.eval.prefilled import Prefilled

RESIDENT = 2  # layers on the GPU at a time: the one that runs and the one that comes next


@dataclass(frozen=True)
class OffloadedMethod(Method):
    """transformers' offloaded cache: exact, with two layers' rows on the GPU at a time.

    It differs from `full` only in speed and memory. The stock model prefills the prompt again, in
    the chunks of the shared prefill: the sliding layers of a stock cache cannot be filled from
    rows.
    """

    name: ClassVar[str] = "offloaded"
    summary: ClassVar[str] = "transformers' offloaded cache (needs CUDA)"
    needs_all_queries: ClassVar[bool] = False

    def start(self, prompt: Prefilled) -> StockSession:
        info = prompt.cache.info
        if info.device.type != "cuda":
            raise MethodUnavailableError(
                f"Method 'offloaded' needs the model on a CUDA device, it is on {info.device}: transformers moves the cache "
                "between GPU and main memory on CUDA streams."
            )
        cache = DynamicCache(config=prompt.model.config.get_text_config(decoder=True), offloading=True)
        chunk = prompt.length if info.rope_switch is not None else prompt.cache.config.prefill_chunk
        reset_rope(prompt.model, info)
        ids = torch.tensor([prompt.token_ids], device=info.device)
        for start in range(0, prompt.length, chunk):
            prompt.model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return StockSession(prompt, cache, lambda cache: resident_bytes(cache, prompt.full_layers))


def resident_bytes(cache: Any, layers: list[int]) -> int:
    """Return the bytes at 16 bits of the full-attention layers that are on the GPU at a time."""
    state = cache.layers[layers[0]]
    return min(RESIDENT, len(layers)) * ORDINARY_ITEMSIZE * (state.keys.numel() + state.values.numel())
