"""transformers' own `QuantizedCache` over prompts of any length, as a baseline."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import QuantizedCache
from transformers.cache_utils import HQQQuantizedLayer

from specache.errors import ConfigError

PACKAGES = {"hqq": "hqq", "quanto": "optimum-quanto"}
_AXES = {"hqq": 1, "quanto": 0}  # recommended by transformers' guide


def new_quantized_cache(model: Any, backend: str, bits: int, q_group_size: int, residual_length: int) -> Any:
    """Return an empty cache for `model`.

    Raises:
        ImportError: the backend's library is not installed.
        ValueError: it cannot hold this model.
    """
    axis = _AXES[backend]
    return QuantizedCache(
        backend=backend,
        config=model.config.get_text_config(decoder=True),
        nbits=bits,
        axis_key=axis,
        axis_value=axis,
        q_group_size=q_group_size,
        residual_length=residual_length,
    )


def store_prompt(cache: Any, index: int, keys: Tensor, values: Tensor) -> None:
    """Store a prompt's keys and values [B, Hkv, S, D] in an empty layer.

    Tokens that are not quantised begin the residual.

    Raises:
        ConfigError: as `quantised_tokens`.
    """
    whole = quantised_tokens(cache.layers[index], keys.shape[2], keys[:, :, 0].numel())
    cache.update(keys[:, :, :whole], values[:, :, :whole], index)
    if whole < keys.shape[2]:
        cache.update(keys[:, :, whole:], values[:, :, whole:], index)


def quantised_tokens(layer: Any, length: int, elements: int) -> int:
    """Return how many tokens of a prompt a layer quantises.

    These are all tokens, as in stock generation. But hqq packs whole bytes only, so tokens that
    would fill a part of one are left out (stock generation fails at such lengths).

    Args:
        elements: key elements of a token, in all sequences together.

    Raises:
        ConfigError: groups do not divide a token, a full residual could not be packed, or the
            prompt has too few tokens.
    """
    if elements % layer.q_group_size:
        raise ConfigError(f"q_group_size ({layer.q_group_size}) has to divide the {elements} elements of a token's keys.")
    if not isinstance(layer, HQQQuantizedLayer):
        return length  # quanto pads the last byte
    together = 8 // layer.nbits  # groups whose codes share bytes
    tokens = together // math.gcd(together, elements // layer.q_group_size)
    if layer.residual_length % tokens:
        raise ConfigError(f"residual_length is a multiple of {tokens} with hqq and this model, got {layer.residual_length}.")
    if length < tokens:
        raise ConfigError(f"transformers' QuantizedCache with hqq needs at least {tokens} tokens of this model, got {length}.")
    return length - length % tokens
