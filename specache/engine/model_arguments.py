"""Checks of a call's model inputs beside the prompt and its mask: none may change the result.

specache runs a model on token ids at consecutive positions. It would drop images, embeddings and
other inputs, so they are refused by name. Inputs without effect (`None`, a parameter's default,
segment ids that are all zero) are accepted, as in stock generate.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.utils import TransformersKwargs

from specache.errors import UsageError

PASSED_ON = ("input_ids", "attention_mask", "position_ids", "past_key_values")  # checked elsewhere
PREPARED = ("logits_processor", "stopping_criteria", "generation_config", "use_cache", "output_attentions", "output_hidden_states")
"""Arguments that stock generate passes to a decoding function beside the model's inputs."""

_NO_EFFECT = {"logits_to_keep", "num_logits_to_keep"}  # only the last position's logits are used
_SETTINGS_OF_GENERATE = {
    *(name for name in inspect.signature(GenerationMixin.generate).parameters if name not in ("self", "kwargs")),
    *("trust_remote_code", "tokenizer", "assistant_tokenizer"),
}
_DEFAULTS = {"output_router_logits": False, "is_causal": True}  # defaults of arguments that every model takes
_ZEROS_ARE_TEXT = {"mm_token_type_ids", "moe_mm_token_type_ids"}  # non-zero ids mark images and other media
_ZERO_SEGMENTS_ARE_TEXT = {"gemma3", "gemma3n", "shieldgemma2", "hrm_text"}  # types whose `token_type_ids` do so too
_EVERY_MODEL_TAKES = TransformersKwargs.__optional_keys__
_STOCK = "or use the model's stock generate()"
_MEDIA = re.compile(r"pixel|image|video|audio|visual|vision|patches|input_features|input_values|mm_encoder|grid_thw|spatial")
_ENCODER = re.compile(r"encoder|^cross_")


def model_arguments(model: Any, arguments: Mapping[str, Any], config: Any = None) -> dict[str, Any]:
    """Return the arguments of `generate` that are model inputs, not settings.

    Args:
        config: the GenerationConfig that was passed, or `None`.
    """
    configs = [GenerationConfig(), *(one for one in (getattr(model, "generation_config", None), config) if one is not None)]
    settings = {name for name in arguments if any(hasattr(one, name) for one in configs)} | _SETTINGS_OF_GENERATE
    return {name: value for name, value in arguments.items() if name not in settings}


def check_model_arguments(model: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse model inputs that specache does not pass on.

    Args:
        arguments: model inputs by name, without the prompt, its mask, `position_ids` and the cache.

    Raises:
        UsageError: names the argument.
    """
    parameters = inspect.signature(model.forward).parameters
    for name, value in arguments.items():
        if name in _NO_EFFECT or _changes_nothing(model, name, value, parameters):
            continue
        raise UsageError(_refusal(name, type(model).__name__, name in parameters or name in _EVERY_MODEL_TAKES))


def check_position_ids(position_ids: Any, new: list[list[int]], texts: list[list[int]]) -> None:
    """Refuse position ids other than 0, 1, 2, ... in every text.

    Args:
        position_ids: [B, n], [3, B, n] of a model with several position axes, or a batch dimension
            that is repeated to B.
        new: the tokens of the call [B][tokens], without padding.
        texts: the full texts [B][tokens], stored tokens included.

    Raises:
        UsageError: they differ.
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() not in (1, 2, 3) or position_ids.numel() == 0:
        raise UsageError("position_ids must be a tensor [batch, length]. Leave it out: positions follow from attention_mask.")
    axes = position_ids.reshape(-1, *position_ids.shape[-2:]) if position_ids.dim() > 1 else position_ids[None, None]
    for axis in axes.tolist():
        for index, (tokens, text) in enumerate(zip(new, texts, strict=True)):
            given = axis[index * len(axis) // len(new)][-len(tokens) :]
            if given != list(range(len(text) - len(tokens), len(text))):
                raise UsageError(
                    f"position_ids of sequence {index} are not the places of its tokens in the text "
                    f"({len(text) - len(tokens):,} to {len(text) - 1:,}): specache keeps every token at its place. Leave "
                    f"position_ids out, {_STOCK}."
                )


def _changes_nothing(model: Any, name: str, value: Any, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether the argument has no effect on the model's output."""
    if value is None:
        return True
    if isinstance(value, Tensor):
        return name in parameters and _zeros_are_text(model, name) and not value.any()
    default = parameters[name].default if name in parameters else _DEFAULTS.get(name, inspect.Parameter.empty)
    return isinstance(value, bool | int | float | str) and type(value) is type(default) and value == default


def _zeros_are_text(model: Any, name: str) -> bool:
    """Return whether ids of zero equal no ids; some models add an embedding for them instead."""
    if name in _ZEROS_ARE_TEXT:
        return True
    if name != "token_type_ids":
        return False
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind in _ZERO_SEGMENTS_ARE_TEXT or any(part.endswith("token_type_embeddings") for part, _ in model.named_modules())


def _refusal(name: str, model: str, known: bool) -> str:
    """Return the message that says why an argument is not supported, and what to do."""
    if name.endswith("inputs_embeds"):
        return f"{name} is not supported: a SpeCache knows its sequences by their token ids. Pass input_ids, {_STOCK}."
    if name == "past_key_values":
        return "past_key_values is not among the inputs here: pass the SpeCache as cache=."
    if name == "labels":
        return "labels are for training, and no loss is computed here. Leave them out."
    if name == "cache_position":
        return "cache_position is not used: positions follow from what the SpeCache holds and from attention_mask. Leave it out."
    if name in ("head_mask", "layer_head_mask"):
        return f"{name} is not supported: every head attends. Leave it out, {_STOCK}."
    if name.endswith("token_type_ids"):
        what = f"would change what {model} computes, and specache does not pass it on" if known else f"is no input of {model}"
        return f"{name} {what}. Leave it out (the tokenizer's return_token_type_ids=False)."
    if _MEDIA.search(name):
        return (
            f"{name} cannot be used: specache generates from text and runs no encoder of images, video or sound, so the answer "
            f"would be about something that was never seen. Leave it out, {_STOCK}."
        )
    if _ENCODER.search(name):
        return f"{name} belongs to an encoder, and specache runs decoder-only models. Leave it out, {_STOCK}."
    if known:
        return f"{name} is an input of {model} that specache does not pass on: it runs on token ids alone. Leave it out, {_STOCK}."
    return f"{name!r} is no argument that specache or {model} knows (a typing error, perhaps). Leave it out."
