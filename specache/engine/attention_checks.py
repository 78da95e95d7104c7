"""Checks of the arguments that a model passes to its attention function.

Our attention is causal, within the configured window, with a scale, a softcap and sinks. It ignores
biases, masks, sparse selections and dropout. A model that passes one would silently get wrong
results, so it is refused by the argument's name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from specache.errors import UnsupportedModelError

SUPPORTED = {"softcap", "s_aux", "sliding_window", "is_causal", "dropout"}  # by `_attention`, or checked below
WITHOUT_EFFECT = {  # passed down to every module, or used only by other attention implementations
    "position_ids", "position_embeddings", "cache_position", "logits_to_keep", "deterministic", "token_type_ids",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "num_items_in_batch",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_cache", "training",
}  # fmt: skip
_KNOWN = SUPPORTED | WITHOUT_EFFECT
_MASKED = -1e4  # an additive mask this low hides a key


def check_arguments(module: Any, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
    """Refuse arguments of an attention layer that our attention does not support.

    Raises:
        UnsupportedModelError: names the argument, or the shapes that do not fit.
    """
    for argument, given in arguments.items():
        if argument not in _KNOWN and given is not None and given is not False:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {argument} to its attention, which specache's attention over a low-bit copy does "
                "not take into account: its answers would be wrong. Use the model's ordinary cache."
            )
    if arguments.get("is_causal") is False:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends to later tokens too (is_causal=False); specache runs causal decoders."
        )
    if arguments.get("dropout"):
        raise UnsupportedModelError(
            f"{type(module).__name__} drops attention at random (dropout={arguments['dropout']}): the model is in training mode. "
            "Call model.eval() first."
        )
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    batch, heads, tokens, dim = of_key
    if of_value != of_key or of_query[1] % heads or of_query != (batch, of_query[1], tokens, dim):
        _refuse_shapes(type(module).__name__, query, key, value)


def _refuse_shapes(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise the error for shapes of which one does not fit."""
    if key.shape[-1] != value.shape[-1] or query.shape[-1] != key.shape[-1]:
        raise UnsupportedModelError(
            f"{name} has queries of {query.shape[-1]}, keys of {key.shape[-1]} and values of {value.shape[-1]} elements per head; "
            "specache stores keys and values in pairs of one size."
        )
    if key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        raise UnsupportedModelError(
            f"{name} has {query.shape[1]} query, {key.shape[1]} key and {value.shape[1]} value heads; specache needs as many value "
            "heads as key heads, and equal groups of query heads."
        )
    if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2] or key.shape[2] != value.shape[2]:
        raise UnsupportedModelError(
            f"{name} attends from {query.shape[2]} tokens to {key.shape[2]} others (cross-attention, or a cache of its own); "
            "specache runs self-attention whose keys it stores itself."
        )


def check_mask(module: Any, mask: Tensor | None, window: int | None) -> None:
    """Refuse a mask that a model made by itself, unless it is causal, or causal within the window.

    Args:
        mask: the attention function's [B or 1, H or 1, n, n], bool (True: visible) or additive.
        window: `sliding_window` as the model passes it.

    Raises:
        UnsupportedModelError: the mask is another one.
    """
    if mask is not None and not (isinstance(mask, Tensor) and _is_causal(mask, window)):
        raise UnsupportedModelError(
            f"{type(module).__name__} has a mask or a bias of its own (attention_mask), beyond causal attention. specache's "
            "attention over a low-bit copy does not take it into account: its answers would be wrong. Use the ordinary cache."
        )


def check_mask_request(arguments: dict[str, Any]) -> None:
    """Refuse a mask that a model asks transformers for, unless it is causal, or within a window.

    Args:
        arguments: keyword arguments of a function of `AttentionMaskInterface`.

    Raises:
        UnsupportedModelError: the mask is another one.
    """
    if arguments.get("allow_is_causal_skip") and not arguments.get("use_vmap"):
        return  # transformers itself makes no mask then
    skips = [name for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip") if name in arguments]
    mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**(arguments | dict.fromkeys(skips, False)))
    if mask is None or _is_causal(mask, arguments.get("local_size")):
        return
    name = type(arguments.get("config")).__name__.removesuffix("Config")
    raise UnsupportedModelError(
        f"{name} asks for a mask beyond causal attention (later tokens, blocks or a prefix are seen too). specache runs causal "
        "decoders."
    )


def _is_causal(mask: Tensor, window: int | None) -> bool:
    """Return whether a mask [.., n, n] is exactly causal, within `window` tokens if given."""
    rows, keys = mask.shape[-2:]
    if rows != keys:
        return False
    distance = torch.arange(rows, device=mask.device)[:, None] - torch.arange(keys, device=mask.device)
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    if mask.dtype == torch.bool:
        return bool((mask == seen).all())
    return bool((mask[..., seen] == 0).all()) and bool((mask[..., ~seen] <= _MASKED).all())
