"""Checks of a generation request: what cannot be honoured is refused before anything runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specache.cache import SpeCache
from specache.errors import UsageError
from specache.model import ModelInfo

_ADVICE = "Use greedy or sampled decoding (num_beams=1), or the model's stock generate()."


def check_generation_config(config: Any) -> None:
    """Refuse decoding modes and outputs that a low-bit cache has no answer for.

    Raises:
        UsageError: names the argument.
    """
    modes = {
        "num_beams": (config.num_beams or 1) > 1,
        "penalty_alpha (contrastive search)": bool(getattr(config, "penalty_alpha", None)),
        "dola_layers": getattr(config, "dola_layers", None) is not None,
        "prompt_lookup_num_tokens": getattr(config, "prompt_lookup_num_tokens", None) is not None,
        "assistant_early_exit": getattr(config, "assistant_early_exit", None) is not None,
        "constraints": bool(getattr(config, "constraints", None) or getattr(config, "force_words_ids", None)),
    }
    for name, wanted in modes.items():
        if wanted:
            raise UsageError(f"specache cannot decode with {name}. {_ADVICE}")
    if config.output_attentions:
        raise UsageError("output_attentions is not available: no step holds the attention of a whole layer. Leave it out.")
    if config.output_hidden_states:
        raise UsageError("output_hidden_states is not available from specache. Leave it out.")
    if config.use_cache is False:
        raise UsageError("use_cache=False contradicts specache, which is a cache. Leave it out.")
    if config.cache_implementation is not None:
        raise UsageError(
            f"cache_implementation={config.cache_implementation!r} names one of transformers' own caches. Leave it out; "
            "specache's settings go into SpeCacheConfig."
        )


def check_model_arguments(arguments: dict[str, Any]) -> None:
    """Refuse inputs other than token ids."""
    if arguments.get("inputs_embeds") is not None:
        raise UsageError("inputs_embeds is not supported: a SpeCache knows its sequences by their token ids. Pass input_ids.")
    if arguments.get("assistant_model") is not None:
        raise UsageError(f"specache cannot decode with assistant_model. {_ADVICE}")


def user_cache(past_key_values: Any) -> SpeCache | None:
    """The SpeCache that was handed on, or `None`; the empty cache that stock `generate` prepares is ignored."""
    if past_key_values is None or isinstance(past_key_values, SpeCache):
        return past_key_values
    if getattr(past_key_values, "_is_user_defined", False):
        raise UsageError(
            f"past_key_values is a {type(past_key_values).__name__}; specache continues from a SpeCache only. "
            "Leave it out, or pass specache.SpeCache(model, config)."
        )
    return None


def prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The rows of a left-padded batch without their padding.

    Raises:
        UsageError: not a batch of token ids, an empty prompt, a mask with holes or right padding.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        raise UsageError("input_ids must be a tensor of token ids [batch, length].")
    if input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise UsageError("The prompt is empty; there is nothing to continue. Pass at least one token.")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.dim() != 2 or attention_mask.shape[0] != input_ids.shape[0]:
        raise UsageError("attention_mask must have the shape [batch, length] of input_ids.")
    mask = attention_mask[:, -input_ids.shape[1] :].bool().cpu()
    if not mask.any(dim=1).all():
        raise UsageError("A prompt of the batch is empty: its attention_mask is all zeros. Pass at least one token.")
    first = mask.int().argmax(dim=1)
    kept = torch.arange(mask.shape[1]) >= first[:, None]
    if not torch.equal(mask, kept):
        raise UsageError(
            "attention_mask has holes or padding on the right. Pad prompts on the left (tokenizer.padding_side='left') and "
            "mark the padding only."
        )
    rows = input_ids.tolist()
    return [row[start:] for row, start in zip(rows, first.tolist(), strict=True)]


def inferred_mask(input_ids: Any, generation_config: Any) -> Tensor | None:
    """The mask of a batch that came without one: pad tokens at the front of a row are padding, those inside it are text.

    As in stock generate, nothing is inferred when the pad token also ends a text.
    """
    pad, ends = generation_config.pad_token_id, generation_config.eos_token_id
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        return None
    if pad is None or pad in (ends if isinstance(ends, list) else [ends]):
        return torch.ones_like(input_ids)
    return (input_ids != pad).cummax(dim=1).values.to(input_ids.dtype)


def check_sequences(cache: SpeCache, token_ids: list[list[int]]) -> None:
    """Refuse a batch for the cache of a session."""
    if cache.one_sequence and len(token_ids) > 1:
        raise UsageError(
            f"A session holds one sequence, but the batch has {len(token_ids)} (num_return_sequences counts too). Use a session "
            "for each of them, or SpeCache(model, config) for the batch."
        )


def check_prompt_lengths(token_ids: list[list[int]], info: ModelInfo) -> None:
    """Refuse prompts that the model has no positions for."""
    longest = max(len(row) for row in token_ids)
    if info.max_positions is not None and longest > info.max_positions:
        raise UsageError(
            f"The prompt has {longest:,} tokens but the model has positions for {info.max_positions:,}. Shorten the prompt, or "
            "use a model with a longer context."
        )
    info.check_position(longest - 1)


def check_max_new_tokens(max_new_tokens: Any) -> None:
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}. To only fill a cache use specache.prefill.")
