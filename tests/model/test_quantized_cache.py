"""A prompt of any length can be stored in transformers' quantised cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, HQQQuantizedLayer, QuantizedLayer, QuantoQuantizedLayer

from specache.errors import ConfigError
from specache.model.quantized_cache import quantised_tokens, store_prompt


class WholeBytes(HQQQuantizedLayer):
    """hqq's layer without the library: codes are the numbers themselves, and groups must fill whole
    bytes.
    """

    def __init__(self, bits: int = 2, group: int = 64, residual: int = 128) -> None:
        QuantizedLayer.__init__(self, bits, 1, 1, group, residual)

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        if tensor.numel() // self.q_group_size % (8 // self.nbits):
            raise RuntimeError("the shapes do not match")  # what hqq says is no more
        return tensor.clone()

    def _dequantize(self, codes: Any) -> Tensor:
        return codes


class AnyLength(QuantoQuantizedLayer):
    def __init__(self, group: int) -> None:
        QuantizedLayer.__init__(self, 2, 0, 0, group, 128)


@pytest.mark.parametrize(
    ("layer", "elements", "whole"),
    [
        (WholeBytes(), 3 * 64, 100),  # SmolLM2's three KV heads: three groups per token, four to a byte
        (WholeBytes(bits=1), 2 * 64, 100),
        (WholeBytes(group=32), 8 * 128, 103),
        (WholeBytes(bits=8), 64, 103),
        (AnyLength(64), 3 * 64, 103),
    ],
)
def test_tokens_that_fill_no_whole_byte_are_not_quantised(layer, elements, whole):
    assert quantised_tokens(layer, 103, elements) == whole


@pytest.mark.parametrize(
    ("layer", "length", "message"),
    [
        (WholeBytes(residual=30), 100, "multiple of 4"),
        (WholeBytes(), 3, "at least 4 tokens"),
        (WholeBytes(group=128), 100, "has to divide"),
        (AnyLength(128), 100, "has to divide"),
    ],
)
def test_a_prompt_that_cannot_be_packed_is_refused(layer, length, message):
    with pytest.raises(ConfigError, match=message):
        quantised_tokens(layer, length, 3 * 64)


@pytest.mark.parametrize("length", [8, 9, 10, 11])
def test_a_stored_prompt_is_complete_and_can_be_continued(length):
    cache = Cache(layers=[WholeBytes(residual=8)])
    keys, values = torch.randn(2, 1, 3, length + 20, 64).unbind()  # [B = 1, Hkv, S, D]
    store_prompt(cache, 0, keys[:, :, :length], values[:, :, :length])
    for i in range(length, length + 20):  # over two residuals that fill up
        held = cache.update(keys[:, :, i : i + 1], values[:, :, i : i + 1], 0)
        assert torch.equal(held[0], keys[:, :, : i + 1]) and torch.equal(held[1], values[:, :, : i + 1])
