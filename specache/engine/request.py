"""Checks of a generation request: an unsupported one is refused before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from specache.cache.cache import SpeCache
from specache.config import SpeCacheConfig
from specache.errors import UsageError
from specache.model.info import ModelInfo

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_decoding_loop(arguments: Mapping[str, Any]) -> None:
    """Refuse an assistant model, another decoding loop, and steps in time with other processes.

    Raises:
        UsageError: names the argument.
    """
    if arguments.get("custom_generate") is not None:
        raise UsageError("specache.generate has a decoding loop of its own. Leave custom_generate out.")
    if arguments.get("assistant_model") is not None:
        raise UsageError(
            "specache cannot decode with assistant_model. Use greedy or sampled decoding (num_beams=1), or the model's stock "
            "generate()."
        )
    if arguments.get("synced_gpus"):
        raise UsageError(
            "specache does not keep steps in time with other processes (synced_gpus), without which a model that is sharded over "
            "them would hang. Use the model's stock generate()."
        )


def check_types(config: Any, generation_config: Any, past_key_values: Any) -> None:
    """Refuse settings and caches of a wrong type.

    Raises:
        UsageError: names the argument.
    """
    if not isinstance(config, SpeCacheConfig | None):
        raise UsageError(f"config must be a specache.SpeCacheConfig, not {_described(config)}.")
    if not isinstance(generation_config, GenerationConfig | None):
        raise UsageError(f"generation_config must be a transformers.GenerationConfig, not {_described(generation_config)}.")
    if not isinstance(past_key_values, SpeCache | None):
        raise UsageError(
            f"past_key_values is {_described(past_key_values)}; specache continues from a SpeCache only. "
            "Leave it out, or pass specache.SpeCache(model, config)."
        )


def check_request(seed: Any, callback: Any, arguments: dict[str, Any]) -> None:
    """Refuse what a request of an engine cannot have.

    Raises:
        UsageError: names the argument.
    """
    if seed is not None and not (isinstance(seed, Integral) and -(2**63) <= int(seed) < 2**64):
        raise UsageError(f"seed must be a whole number from -2^63 to 2^64 - 1, not {seed!r}.")
    if callback is not None and not callable(callback):
        raise UsageError(f"callback must be a function of (row, token), not {_described(callback)}.")
    for name in ("past_key_values", "config"):
        if arguments.get(name) is not None:
            raise UsageError(
                f"make_request takes no {name}: the engine makes the cache of a request. Pass the settings to "
                "specache.Engine(model, config); to use a cache of your own call specache.generate."
            )


def check_cache(cache: Any) -> None:
    """Refuse a cache that is not a SpeCache.

    Raises:
        UsageError: names its type.
    """
    if not isinstance(cache, SpeCache):
        raise UsageError(f"cache must be a SpeCache, not {_described(cache)}. Pass specache.SpeCache(model, config).")


def user_cache(past_key_values: Any) -> SpeCache | None:
    """Return the SpeCache that was passed, or `None`, also for stock `generate`'s empty cache.

    Raises:
        UsageError: it is another kind of cache.
    """
    if past_key_values is None or isinstance(past_key_values, SpeCache):
        return past_key_values
    if getattr(past_key_values, "_is_user_defined", False):
        raise UsageError(
            f"past_key_values is a {type(past_key_values).__name__}; specache continues from a SpeCache only. "
            "Leave it out, or pass specache.SpeCache(model, config)."
        )
    return None


def cache_for(model: Any, config: SpeCacheConfig | None, given: SpeCache | None) -> SpeCache:
    """Return the given cache, or a new one.

    Raises:
        UsageError: the given cache belongs to another model, or has other settings.
    """
    if given is None:
        return SpeCache(model, config)
    given.check_model(model)
    if config is not None and not given.has_config(config):
        raise UsageError("A SpeCache keeps the config it was made with. Leave config out, or start a new SpeCache(model, config).")
    return given


def stored_new_tokens(generation_config: Any, input_ids: Tensor) -> int:
    """Return the most tokens that decoding stores per sequence: all new ones but the last."""
    new = (generation_config.max_length or 0) - input_ids.shape[1]
    return max(0, new - 1)


def chunk_size(generation_config: Any) -> int | None:
    """Return the prompt tokens per forward pass that a call asks for, `None` for the cache's.

    Raises:
        UsageError: it asks for none, or for no whole number.
    """
    size = generation_config.prefill_chunk_size
    if size is None:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UsageError(f"prefill_chunk_size must be a positive number of tokens, got {size!r}. Leave it out for the cache's own.")
    return size


def prompt_ids(input_ids: Any, inputs: Any) -> Tensor:
    """Return the prompt's token ids [B, S], passed under either name.

    Raises:
        UsageError: none or both were passed, or the prompt is not a tensor of token ids.
    """
    if input_ids is not None and inputs is not None:
        raise UsageError("input_ids and inputs are two names of the prompt. Pass one of them.")
    ids = inputs if input_ids is None else input_ids
    if ids is None:
        raise UsageError("There is no prompt: pass input_ids, a tensor of token ids [batch, length].")
    check_token_ids(ids)
    return cast(Tensor, ids)


def check_token_ids(ids: Any) -> None:
    """Refuse a prompt that is empty or not a tensor of token ids [B, S].

    Raises:
        UsageError: says what was passed, and what to do.
    """
    if not isinstance(ids, Tensor):
        raise UsageError(f"input_ids must be a tensor of token ids [batch, length], not {_described(ids)}.{_conversion(ids)}")
    if ids.dtype not in _INTEGERS:
        raise UsageError(f"input_ids must be a tensor of token ids, but its numbers are {ids.dtype}. Pass torch.long.")
    if ids.dim() == 1 and ids.numel():
        raise UsageError("input_ids must be a tensor of token ids [batch, length], but it has one dimension. Pass input_ids[None].")
    if ids.numel() == 0:
        raise UsageError("The prompt is empty; there is nothing to continue. Pass at least one token.")
    if ids.dim() != 2:
        raise UsageError(f"input_ids must be a tensor of token ids [batch, length], but has the shape {list(ids.shape)}.")


def check_mask(attention_mask: Any, input_ids: Tensor) -> None:
    """Refuse a mask that is not zeros and ones [B, W], W >= S, for input_ids [B, S].

    Raises:
        UsageError: says what is wrong.
    """
    if not isinstance(attention_mask, Tensor):
        raise UsageError(f"attention_mask must be a tensor [batch, length], not {_described(attention_mask)}.")
    rows, columns = input_ids.shape
    if attention_mask.dim() != 2 or attention_mask.shape[0] != rows:
        shape = list(attention_mask.shape)
        raise UsageError(f"attention_mask must have the shape [batch, length] of input_ids, {[rows, columns]}, but has {shape}.")
    if attention_mask.shape[1] < columns:
        raise UsageError(f"attention_mask has {attention_mask.shape[1]:,} columns for {columns:,} tokens. Pass one for each.")
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise UsageError("attention_mask must say 1 for tokens and 0 for padding; it has other numbers. Pass the tokenizer's.")


def unpadded_rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Return the rows [B][tokens] of a left-padded batch [B, S] without their padding.

    Args:
        attention_mask: [B, W], W >= S; its last S columns belong to input_ids.

    Raises:
        UsageError: not a batch of token ids, an empty prompt, a mask with holes or right padding.
    """
    check_token_ids(input_ids)
    if attention_mask is None:
        return input_ids.tolist()
    check_mask(attention_mask, input_ids)
    mask = attention_mask[:, -input_ids.shape[1] :].bool().cpu()
    if not mask.any(dim=1).all():
        raise UsageError("A prompt of the batch is empty: its attention_mask is all zeros. Pass at least one token.")
    first = mask.int().argmax(dim=1)
    kept = torch.arange(mask.shape[1], device=mask.device) >= first[:, None]
    if not torch.equal(mask, kept):
        raise UsageError(
            "attention_mask has holes or padding on the right. Pad prompts on the left (tokenizer.padding_side='left') and "
            "mark the padding only."
        )
    rows = input_ids.tolist()
    return [row[start:] for row, start in zip(rows, first.tolist(), strict=True)]


def check_vocabulary(model: Any, token_ids: list[list[int]]) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        UsageError: names the token and its position.
    """
    try:
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # a model's own code may lack it
        size = None
    if size is None:
        return
    for number, row in enumerate(token_ids):
        if min(row) < 0 or max(row) >= size:
            place = next(i for i, token in enumerate(row) if not 0 <= token < size)
            raise UsageError(
                f"Token {row[place]} at position {place:,} of prompt {number} is not in the model's vocabulary of {size:,} tokens. "
                "Use the tokenizer that belongs to the model."
            )


def inferred_mask(input_ids: Any, pad: int | None) -> Tensor | None:
    """Return the mask of a batch without one: only leading pad tokens of a row are padding.

    Args:
        pad: the token that can only be padding, or `None`.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        return None
    if pad is None:
        return torch.ones_like(input_ids)
    return (input_ids != pad).cummax(dim=1).values.to(input_ids.dtype)


def check_sequences(cache: SpeCache, token_ids: list[list[int]]) -> None:
    """Refuse more than one prompt for the cache of a session."""
    if cache.one_sequence and len(token_ids) > 1:
        raise UsageError(
            f"A session holds one sequence, but the batch has {len(token_ids)} (num_return_sequences counts too). Use a session "
            "for each of them, or SpeCache(model, config) for the batch."
        )


def check_prompt_lengths(token_ids: list[list[int]], info: ModelInfo) -> None:
    """Refuse prompts longer than the model's positions."""
    longest = max(len(row) for row in token_ids)
    if info.max_positions is not None and longest > info.max_positions:
        raise UsageError(
            f"The prompt has {longest:,} tokens but the model has positions for {info.max_positions:,}. Shorten the prompt, or "
            "use a model with a longer context."
        )
    info.check_position(longest - 1)


def check_max_new_tokens(max_new_tokens: Any) -> None:
    """Refuse a limit that is no number, or below 1."""
    if not isinstance(max_new_tokens, Real | Tensor | None):
        raise UsageError(f"max_new_tokens must be a number, not {_described(max_new_tokens)}.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}. To only fill a cache use specache.prefill.")


def _described(value: Any) -> str:
    name = type(value).__name__
    return f"a {name}" if name[0] not in "AEIOUaeiou" else f"an {name}"


def _conversion(value: Any) -> str:
    """Return a sentence that says how to convert another type to token ids, or nothing."""
    if isinstance(value, Mapping):
        return " Pass its parts by name: generate(model, **inputs)."
    if isinstance(value, str):
        return " Pass tokenizer(text, return_tensors='pt').input_ids."
    if isinstance(value, list | tuple):
        return " Pass torch.tensor(ids), or what tokenizer(..., return_tensors='pt') gives."
    if type(value).__module__ == "numpy":
        return " Pass torch.from_numpy(ids)."
    return ""
