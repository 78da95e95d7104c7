"""Inspect a model before it runs: sliding layers, number of positions, RoPE.

Refuse unsupported models with the reason.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import Any

import torch

from specache.errors import UnsupportedModelError, UsageError
from specache.model.attention_functions import refuse_replaced_attention
from specache.model.identity.adapters import refuse_adapters_per_call
from specache.model.identity.offloaded_weights import execution_device
from specache.model.identity.wrappers import unwrapped
from specache.model.per_layer import attention_modules, differing_dims, layer_settings
from specache.model.positions import computes_positions_itself, max_positions, position_table, rope_switch

_ATTENTION_KINDS = {"full_attention", "sliding_attention"}
_SCALES_ALL_ROWS = "torch.ao.nn.quantized.dynamic"


@dataclass(frozen=True)
class ModelInfo:
    """Facts about one model.

    Attributes:
        windows: per layer, the sliding window in tokens, or None for full attention.
        max_positions: tokens the model was made for, RoPE scaling included, or None
            (`model.positions`).
        position_limit: hard limit of the sequence length in tokens, or None.
        limit_reason: explanation of the limit.
        rope_type: `default`, `llama3`, `dynamic`, `longrope`, ...
        rope_switch: with `dynamic` and `longrope`, the length above which frequencies change; else
            None.
        fingerprint: identifies configuration and class (for an evaluation's results), wherever the
            model lies.
        couples_rows: rows of a batch affect each other's numbers (PyTorch's dynamic quantisation
            uses one scale for all of them).
        device: device that the model computes on.
        dtype: dtype of its activations: that of its first parameter that is not packed.
    """

    windows: tuple[int | None, ...]
    max_positions: int | None
    position_limit: int | None
    limit_reason: str
    rope_type: str
    rope_switch: int | None
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    couples_rows: bool = False

    def check_position(self, position: int) -> None:
        """Refuse to run a token at a `position` beyond the model's limit.

        Raises:
            UsageError: the position is beyond the limit; the message says which. Stock `generate`
                fails with an index error, or continues with a window.
        """
        if self.position_limit is not None and position >= self.position_limit:
            raise UsageError(
                f"The sequence is {position:,} tokens long and cannot grow: {self.limit_reason}. Ask for fewer new tokens, shorten "
                "the prompt, or use a model with a longer context."
            )

    def rope_side(self, position: int) -> int:
        """Return the regime of RoPE frequencies at a position.

        Rows of different regimes may not share a forward pass, whose longest position decides the
        frequencies.
        """
        if self.rope_switch is None or position < self.rope_switch:
            return 0
        return position + 1 if self.rope_type == "dynamic" else 1

    def keeps_keys(self, last: int, position: int) -> bool:
        """Return True if keys of a text up to `last` stay valid in a text up to `position`.

        The length decides the frequencies (long RoPE, as stock recomputes them), and a text that
        became short again has the original ones.
        """
        before, after = self.rope_side(last), self.rope_side(position)
        return before == after if self.rope_type == "longrope" else not before or bool(after)


def inspect_model(model: Any) -> ModelInfo:
    """Return the facts about a transformers model, which may be wrapped (`unwrapped`).

    Raises:
        UnsupportedModelError: its attention cannot run over a low-bit copy.
        UsageError: its adapters are chosen per call.
    """
    model = unwrapped(model)
    name = type(model).__name__
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise UnsupportedModelError(f"{name} is not a transformers model for text generation.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; specache runs decoder-only models.")
    config = model.config.get_text_config(decoder=True)
    _refuse(name, model, config)
    positions = max_positions(model)
    windows, as_full = _windows(name, config, positions)
    _check_modules(name, model)
    limit, reason = _limit(model, as_full)
    rope_type, switch = rope_switch(config)
    refuse_adapters_per_call(model)
    device, dtype = _place(model)
    described = json.dumps([name, _without_paths(model.config.to_dict())], sort_keys=True, default=str)
    return ModelInfo(
        windows=windows,
        max_positions=positions,
        position_limit=limit,
        limit_reason=reason,
        rope_type=rope_type,
        rope_switch=switch,
        fingerprint=hashlib.sha256(described.encode()).hexdigest(),
        device=device,
        dtype=dtype,
        couples_rows=any(type(module).__module__.startswith(_SCALES_ALL_ROWS) for module in model.modules()),
    )


def check_one_gpu(model: Any) -> None:
    """Refuse a model whose weights are on several GPUs.

    Raises:
        UnsupportedModelError: low-bit copies, hot sets and their streams are on one.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")})
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} is spread over {', '.join(devices)}, and specache keeps the low-bit keys and values of all "
            "layers on one device. Load it on one (device_map={'': 0}), in fewer bits if it does not fit, or use policy 'full'."
        )


def _without_paths(settings: Any) -> Any:
    """Return a configuration without the folders it was loaded from, which may be moved."""
    if not isinstance(settings, dict):
        return settings
    return {key: _without_paths(value) for key, value in settings.items() if key not in ("_name_or_path", "name_or_path")}


def _place(model: Any) -> tuple[torch.device, torch.dtype]:
    """Return a model's device and dtype.

    Its weights may be packed, or kept elsewhere between passes.
    """
    parameters = [*model.parameters()] or [torch.empty(0)]
    device = parameters[0].device
    if device.type == "meta":
        device = execution_device(model) or device
    wide = (p.dtype for p in parameters if p.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    return device, next(wide, parameters[0].dtype)


def _windows(name: str, config: Any, positions: int | None) -> tuple[tuple[int | None, ...], int | None]:
    """Return (windows by layer, shortest window treated as full attention or None).

    A window at least as long as the model's positions counts as full attention.
    """
    settings = [layer_settings(config, index) for index in range(config.num_hidden_layers)]
    sizes = [getattr(each, "sliding_window", None) for each in settings]
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if size is None else "sliding_attention" for size in sizes]
    other = sorted(set(kinds) - _ATTENTION_KINDS)
    if other:
        raise UnsupportedModelError(
            f"{name} has layers of kind {', '.join(other)}. specache compresses the key-value pairs of full attention and runs "
            "sliding windows beside it; state-space, linear and other kinds of attention keep something else."
        )
    sliding = [size if kind == "sliding_attention" else None for kind, size in zip(kinds, sizes, strict=True)]
    as_full = [size for size in sliding if size is not None and positions is not None and size >= positions]
    windows = tuple(None if size in as_full else size for size in sliding)
    if all(each is not None for each in windows):
        raise UnsupportedModelError(
            f"Every layer of {name} slides over {max(filter(None, windows))} tokens: its cache does not grow with the context, so "
            "there is nothing to compress. Use the model's ordinary cache."
        )
    return windows, min(as_full, default=None)


def _check_modules(name: str, model: Any) -> None:
    """Refuse attention layers whose keys and values differ in size, and sparse weights."""
    sparse = [weight for weight in model.parameters() if type(weight) is torch.nn.Parameter and weight.layout is not torch.strided]
    if sparse:
        which = next(key for key, weight in model.named_parameters() if weight is sparse[0])
        raise UnsupportedModelError(
            f"The tensor {which} of {name} is not dense ({sparse[0].layout}), and specache cannot read it. Make it dense "
            "(to_dense()), or use the model's stock generate()."
        )
    for index, module in attention_modules(model):
        if dims := differing_dims(module):
            raise UnsupportedModelError(
                f"{name} has keys of {dims[0]} and values of {dims[1]} elements per head (layer {index}); specache stores them in "
                "pairs of one size."
            )


def _limit(model: Any, as_full: int | None) -> tuple[int | None, str]:
    """Return (hard limit of the sequence length or None, its reason)."""
    table = position_table(model)
    if table is not None:
        return table, f"the model's learned positions end at {table:,}"
    if as_full is not None:
        return as_full, f"the model's attention slides from {as_full:,} tokens on, its positions end before, and it was kept whole"
    return None, ""


def _refuse(name: str, model: Any, config: Any) -> None:
    settings = layer_settings(config, 0)
    if getattr(settings, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name} uses latent attention (kv_lora_rank): its cache is a compressed latent already, without per-head "
            "keys and values to quantise."
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{name} is recurrent, at least in part: a state-space model's state has no key-value pairs to compress."
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{name} shares keys and values between layers, which specache does not follow yet.")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(f"{name} does not use transformers' attention interface, so its attention cannot be replaced.")
    if not any(each.kind is each.VAR_KEYWORD for each in inspect.signature(model.forward).parameters.values()):
        raise UnsupportedModelError(
            f"{name} takes no further keyword arguments (**kwargs), through which specache's state reaches its attention."
        )
    if computes_positions_itself(model):
        raise UnsupportedModelError(
            f"{name} counts positions itself and takes none, so a chunk of its prompt would begin at the first position again."
        )
    if any(_is_bidirectional(module) for module in model.modules()):
        raise UnsupportedModelError(f"{name} attends to later tokens too (it is an encoder); specache runs causal decoders.")
    refuse_replaced_attention(model)


def _is_bidirectional(module: Any) -> bool:
    """Return True for bidirectional attention over text.

    Image encoders do not count: they do not number their layers.
    """
    return getattr(module, "layer_idx", None) is not None and getattr(module, "is_causal", True) is False
