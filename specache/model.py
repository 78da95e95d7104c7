"""What specache needs to know of a model before it runs: which layers slide, how many positions, which RoPE.

Models that the method cannot serve are refused here, with the reason.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from specache.errors import UnsupportedModelError
from specache.identity.adapters import refuse_adapters_per_call
from specache.identity.offloaded import execution_device
from specache.identity.wrappers import unwrapped

_ATTENTION_KINDS = {"full_attention", "sliding_attention"}
_SCALES_ALL_ROWS = "torch.ao.nn.quantized.dynamic"
_POSITION_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelInfo:
    """Facts about one model.

    Attributes:
        windows: per layer, the sliding window in tokens, or `None` for full attention.
        max_positions: tokens the model has positions for, or `None`.
        rope_type: `default`, `llama3`, `dynamic`, `longrope`, ...
        rope_switch: with `dynamic` and `longrope`, the length above which frequencies change; else `None`.
        fingerprint: identifies configuration and class (of an evaluation's results).
        couples_rows: the rows of a pass change each other's numbers (PyTorch's dynamic quantisation scales all of them alike).
        device: where the model computes.
        dtype: of its activations: that of its first parameter that is not packed.
    """

    windows: tuple[int | None, ...]
    max_positions: int | None
    rope_type: str
    rope_switch: int | None
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    couples_rows: bool = False

    @property
    def extends_positions(self) -> bool:
        """Whether prompts may be longer than `max_positions` (dynamic NTK scaling is made for that)."""
        return self.rope_type == "dynamic"

    def rope_side(self, position: int) -> int:
        """Rows whose sides differ may not share a forward pass: its longest position decides its frequencies."""
        if self.rope_switch is None or position < self.rope_switch:
            return 0
        return position + 1 if self.rope_type == "dynamic" else 1


def inspect_model(model: Any) -> ModelInfo:
    """Facts about a transformers model, which may be wrapped (`unwrapped`).

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
    windows = _windows(name, config)
    rope_type, switch = _rope(config)
    refuse_adapters_per_call(model)
    device, dtype = _place(model)
    described = json.dumps([name, model.config.to_dict()], sort_keys=True, default=str)
    return ModelInfo(
        windows=windows,
        max_positions=getattr(config, "max_position_embeddings", None),
        rope_type=rope_type,
        rope_switch=switch,
        fingerprint=hashlib.sha256(described.encode()).hexdigest(),
        device=device,
        dtype=dtype,
        couples_rows=any(type(module).__module__.startswith(_SCALES_ALL_ROWS) for module in model.modules()),
    )


def _place(model: Any) -> tuple[torch.device, torch.dtype]:
    """Return where a model computes, and in which dtype; its weights may be packed, or kept elsewhere between passes."""
    parameters = [*model.parameters()] or [torch.empty(0)]
    device = parameters[0].device
    if device.type == "meta":
        device = execution_device(model) or device
    wide = (p.dtype for p in parameters if p.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    return device, next(wide, parameters[0].dtype)


def _windows(name: str, config: Any) -> tuple[int | None, ...]:
    """A window at least as long as the model's positions is full attention."""
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window is not None else "full_attention"] * layers
    other = sorted(set(kinds) - _ATTENTION_KINDS)
    if other:
        raise UnsupportedModelError(
            f"{name} has layers of kind {', '.join(other)}. specache compresses the key-value pairs of full attention and runs "
            "sliding windows beside it; state-space, linear and other kinds of attention keep something else."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if window is not None and positions is not None and window >= positions:
        window = None
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if all(each is not None for each in windows):
        raise UnsupportedModelError(
            f"Every layer of {name} slides over {window} tokens: its cache does not grow with the context, so there is "
            "nothing to compress. Use the model's ordinary cache."
        )
    return windows


def _refuse(name: str, model: Any, config: Any) -> None:
    if getattr(config, "kv_lora_rank", None):
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
    if any(_looks_ahead(module) for module in model.modules()):
        raise UnsupportedModelError(f"{name} attends to later tokens too (it is an encoder); specache runs causal decoders.")


def _looks_ahead(module: Any) -> bool:
    """Whether a module is bidirectional attention over text (image encoders do not number their layers)."""
    return getattr(module, "layer_idx", None) is not None and getattr(module, "is_causal", True) is False


def _rope(config: Any) -> tuple[str, int | None]:
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    for entry in per_layer:
        kind = entry.get("rope_type", "default")
        if kind == "dynamic":
            return kind, config.max_position_embeddings
        if kind == "longrope":
            original = entry.get("original_max_position_embeddings") or config.original_max_position_embeddings
            return kind, int(original)
    return per_layer[0].get("rope_type", "default"), None
