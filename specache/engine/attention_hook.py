"""The hook by which a model calls our attention. Only this file knows transformers' internals.

A model passes extra keyword arguments down to its attention function. So a forward pass is
`model(ids, position_ids=..., use_cache=False, specache=state)` while the model's attention
implementation is set to ours. Without that argument our function calls the user's implementation.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specache.attention.all_layers import StepOfLayers
from specache.engine import attention_checks, compiled, compiled_layers
from specache.engine.compiled_layers import CURRENT_LAYER, CURRENT_PASS, BlankPass, CompiledLayers
from specache.engine.forward_pass import DecodePass, ForwardPass, PrefillPass, attend
from specache.engine.traced import call_shape, traced_layers
from specache.engine.traced.program import RecordedAttention
from specache.engine.traced.traced_layers import TracedAnswer
from specache.engine.traced.traced_pass import TracedPass
from specache.errors import UnsupportedModelError
from specache.kernels.types import AttentionParams
from specache.linear import cpu_linear
from specache.model import rope
from specache.model.attention_functions import refuse_replaced_attention
from specache.model.identity.wrappers import is_compiled_inside, unwrapped
from specache.model.info import ModelInfo, inspect_model
from specache.model.per_layer import attention_modules
from specache.platform import forks, modes

NAME = "specache"
_lock = forks.lock()
# model -> (the user's attention implementation, depth of `attached` blocks)
_attached: weakref.WeakKeyDictionary[Any, tuple[str, int]] = weakref.WeakKeyDictionary()
# model -> (configuration, implementation before) of layers that do not share its configuration
_apart: weakref.WeakKeyDictionary[Any, list[tuple[Any, str]]] = weakref.WeakKeyDictionary()
_linears: weakref.WeakKeyDictionary[Any, list[torch.nn.Linear]] = weakref.WeakKeyDictionary()  # see `cpu_linear`
_ropes: weakref.WeakKeyDictionary[Any, list[torch.nn.Module]] = weakref.WeakKeyDictionary()  # see `rope`
_compiled_inside: weakref.WeakSet[Any] = weakref.WeakSet()  # models that the user compiled, in place or in part
_inside = threading.local()
"""`.layers`: indices of the layers that our running pass has called so far, `None` outside of a
pass. `.masked`: whether the pass was given a mask."""


@contextmanager
def attached(model: Any) -> Iterator[None]:
    """Have the model use our attention inside the block, and the user's afterwards."""
    model = unwrapped(model)
    _attach(model)
    try:
        yield
    finally:
        _detach(model)


def forward(
    model: Any, token_ids: Tensor, position_ids: Tensor, state: ForwardPass | object, logits: int, mask: Tensor | None = None
) -> Tensor:
    """Run one forward pass over token_ids [B, n] at position_ids [B, n].

    Args:
        state: the pass, or `CURRENT_PASS` inside `compiled_layers.running`.
        logits: number of last tokens whose logits are returned.
        mask: four-dimensional, so that transformers passes it on unchanged. Ours ignores it.

    Returns:
        float32 logits [B, `logits`, V].

    Raises:
        UnsupportedModelError: the user has set an attention of somebody else's meanwhile.
    """
    _follow_users_choice(model)
    previous = getattr(_inside, "layers", None), getattr(_inside, "masked", False)
    _inside.layers, _inside.masked = set(), mask is not None
    try:
        with modes.callers(), _uncompiled(model):
            output = model(
                input_ids=token_ids,
                position_ids=position_ids,
                attention_mask=mask,
                use_cache=False,
                return_dict=True,
                logits_to_keep=logits,
                **_unwanted_outputs(model),
                **{NAME: state},
            )
        if isinstance(state, PrefillPass):
            _check_all_attended(model, _inside.layers)
    finally:
        _inside.layers, _inside.masked = previous
    return output.logits[:, -logits:].float()


def _unwanted_outputs(model: Any) -> dict[str, bool]:
    """Return arguments that switch off extra outputs, such as every layer's hidden states."""
    configs = (model.config, model.config.get_text_config(decoder=True))
    names = ("output_attentions", "output_hidden_states", "output_router_logits")
    return {name: False for name in names if any(getattr(config, name, False) for config in configs)}


def _uncompiled(model: Any) -> AbstractContextManager[Any]:
    """Run a model that the user compiled eagerly: Dynamo cannot trace `ForwardPass`."""
    return torch.compiler.set_stance("force_eager") if model in _compiled_inside else nullcontext()


def decode_forward(
    model: Any,
    token_ids: Tensor,
    position_ids: Tensor,
    state: ForwardPass,
    reads_back: bool = True,
    layers: CompiledLayers | TracedAnswer | None = None,
    chained: bool = True,
) -> Tensor:
    """Run a decode step's forward pass and return float32 logits [B, n, V].

    Args:
        reads_back: whether the host may wait for the device. Without a mask, transformers reads the
            positions on the host to detect packed sequences; `False` passes a mask to prevent that.
        layers: decoder layers that run compiled, or as programs. `None` runs the step eagerly.
        chained: whether programs may run in one call for all layers.

    Raises:
        ChainBrokenError: they cannot; the pass must be undone.
    """
    mask = None if reads_back else torch.zeros(1, 1, 1, 1, device=token_ids.device)
    if layers is None:
        return forward(model, token_ids, position_ids, state, logits=token_ids.shape[1], mask=mask)
    once = _OncePerLayer(state, type(model))
    handed = once if isinstance(layers, TracedAnswer) else CURRENT_PASS
    run_by = TracedPass(layers.layers, once.begin_layers if chained else None) if isinstance(layers, TracedAnswer) else layers
    with compiled_layers.running(once, run_by), call_shape.step():
        logits = forward(model, token_ids, position_ids, handed, logits=token_ids.shape[1], mask=mask)
    if isinstance(run_by, TracedPass):
        run_by.end()
    return logits


def warm_up(model: Any, compiled: CompiledLayers, tokens: int, sequences: int) -> None:
    """Run a decode step whose attention is zero, so that its layers are compiled or loaded."""
    ids = torch.zeros(sequences, tokens, dtype=torch.long, device=inspect_model(model).device)
    positions = ids + torch.arange(tokens, device=ids.device)
    decode_forward(model, ids, positions, compiled_layers.BlankPass(), reads_back=ids.device.type == "cpu", layers=compiled)


def reset_rope(model: Any, info: ModelInfo) -> None:
    """Reset dynamic RoPE scaling, which keeps the largest length of earlier passes."""
    if info.rope_type != "dynamic":
        return
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_inv_freq") and not rope.is_installed(module):
            position = torch.zeros(1, 1, dtype=torch.long, device=info.device)
            module(torch.empty(1, 1, 1, device=info.device, dtype=info.dtype), position)


def stock_generate_arguments() -> dict[str, Any] | None:
    """Return the arguments by name of the stock `generate()` on the call stack, or `None`.

    Stock `generate` passes neither `streamer` nor `assistant_model` to a callable
    `custom_generate`, so a streamer would never be ended and an assistant would be ignored
    silently. It also passes its own defaults (positions, settings of the model's files) as if they
    were the caller's.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            passed = frame.f_locals
            return {**passed.get("kwargs", {}), **{name: passed.get(name) for name in ("streamer", "assistant_model")}}
        frame = frame.f_back
    return None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute a layer's attention. Registered with transformers under our name."""
    state = kwargs.pop(NAME, None)
    if state is not None and state is not CURRENT_PASS and not torch.compiler.is_compiling():
        _check(module, query, key, value, attention_mask, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = kwargs.get("s_aux")
    if state is CURRENT_PASS:
        sinks = getattr(module, "sinks", None) if sinks is None else sinks
        layer = CURRENT_LAYER if torch.compiler.is_compiling() else module.layer_idx
        return compiled_layers.attend(query, key, value, layer, scale, kwargs.get("softcap"), sinks), None
    if not isinstance(state, RecordedAttention):
        _check_layer(module, state is not None)
    if state is None:
        return _users_attention(module)(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    sinks = _sinks(module) if sinks is None else sinks
    softcap = kwargs.get("softcap")
    params = _params(scale, softcap) if sinks is None else AttentionParams(scale, softcap, sinks)
    return attend(state, module.layer_idx, query, key, value, params), None


@lru_cache(maxsize=64)
def _params(scaling: float, softcap: float | None) -> AttentionParams:
    """Return the constants of a layer without sinks; most models have the same in all layers."""
    return AttentionParams(scaling, softcap)


def _sinks(module: torch.nn.Module) -> Any | None:
    """Return the layer's attribute `sinks`, if any. `getattr` is slow where there is none."""
    missing = "sinks" not in module._parameters and "sinks" not in module._buffers and "sinks" not in module.__dict__
    return None if missing and not hasattr(type(module), "sinks") else getattr(module, "sinks", None)


def _check(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, arguments: dict[str, Any]) -> None:
    """Refuse arguments that our attention would ignore, apart from the mask of `forward`."""
    attention_checks.check_arguments(module, query, key, value, arguments)
    if not getattr(_inside, "masked", False):
        attention_checks.check_mask(module, mask, arguments.get("sliding_window"))


def _check_layer(module: Any, reached: bool) -> None:
    """Refuse a model whose layers do not get our state, or attend twice in a pass."""
    layers = getattr(_inside, "layers", None)
    if layers is None:
        return
    if not reached:
        name = type(module).__name__
        raise UnsupportedModelError(f"{name} is not handed specache's state: its model drops extra arguments on the way to it.")
    _add_layer(module.layer_idx, layers, type(module))


def _add_layer(layer: int, layers: set[int], kind: type) -> None:
    if layer in layers:
        raise UnsupportedModelError(
            f"{kind.__name__} attends twice in one pass (layer {layer}); specache keeps one set of keys and values per layer."
        )
    layers.add(layer)


def _check_all_attended(model: Any, layers: set[int]) -> None:
    """Refuse a model of which a layer attended by itself: it would see only one pass.

    Cross-attention to images has no keys of the text.
    """
    missing = set(range(model.config.get_text_config(decoder=True).num_hidden_layers)) - layers
    if missing:
        missing -= {index for index, module in attention_modules(model) if "cross" in type(module).__name__.lower()}
    if missing:
        raise UnsupportedModelError(
            f"Layer {min(missing)} of {type(model).__name__} did not use specache's attention: its attention is not "
            "transformers', or its settings are not the model's. specache stores no keys and values of it, so its answers would "
            "be wrong. Use the model's stock generate()."
        )


class _OncePerLayer:
    """A forward pass with the check of `_check_layer`, for layers that do not call `_attention`."""

    def __init__(self, state: ForwardPass, kind: type) -> None:
        self._state = state
        self._kind = kind
        self._layers: set[int] = set()

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        _add_layer(index, self._layers, self._kind)
        return self._state.attention(index, query, keys, values, params)

    def begin_layers(self, numbers: Sequence[int], dtype: torch.dtype, kv_shape: tuple[int, int]) -> StepOfLayers | None:
        """Begin the attention of all these layers, `DecodePass.begin_layers`."""
        if not isinstance(self._state, DecodePass | BlankPass):
            return None
        with modes.ours_again() or nullcontext():
            step = self._state.begin_layers(numbers, dtype, kv_shape)
        if step is not None:
            for number in numbers:
                _add_layer(number, self._layers, self._kind)
        return step


def _users_attention(module: Any) -> Any:
    """Return the attention function that the user had set."""
    name = _users_implementation(module)
    eager = getattr(inspect.getmodule(type(module)), "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def _users_implementation(module: Any) -> str:
    return _users_setting(getattr(module, "config", None))


def _users_setting(config: Any) -> str:
    """Return the attention implementation that the user had set, by a model's or a part's config.

    This also works just after a detach: another thread may be in the middle of a stock pass.
    """
    with _lock:
        known = list(_attached.items())
        apart = [pair for pairs in _apart.values() for pair in pairs]
    for own, name in apart:
        if own is config:
            return name
    for model, (name, _) in known:
        if config is None or model.config is config or model.config.get_text_config() is config:
            return name
    return "sdpa"


def _mask(*args: Any, **kwargs: Any) -> Any:
    """Return no mask for our passes, else the user's. Registered under our name."""
    if torch.compiler.is_compiling():
        return None
    if getattr(_inside, "layers", None) is not None:
        attention_checks.check_mask_request(kwargs)
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[_users_setting(kwargs.get("config"))](*args, **kwargs)


def _attach(model: Any) -> None:
    with _lock:
        name, depth = _attached.get(model, (NAME, 0))
        if depth == 0:
            # It is NAME already after an interrupted attach, and in a copy of an attached model.
            if model.config._attn_implementation != NAME:
                name = model.config._attn_implementation
            elif name == NAME:
                name = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
            _attached[model] = (name, 0)  # before the model can call us
            model.set_attn_implementation(NAME)
            _apart[model] = _take_over_layers(model)
            _linears[model] = cpu_linear.install(model)
            _ropes[model] = rope.install(model, lambda: getattr(_inside, "layers", None) is not None)
            if is_compiled_inside(model):
                _compiled_inside.add(model)
            compiled.install(model)
            traced_layers.install(model)
        _attached[model] = (name, depth + 1)


def _follow_users_choice(model: Any) -> None:
    """Take the place of the attention that the user has set since the model was attached.

    Streamers and processors may do so between two steps, to look at attention weights.
    """
    name = model.config._attn_implementation
    if name == NAME:
        return
    refuse_replaced_attention(model)
    with _lock:
        _attached[model] = name, _attached[model][1]
        model.set_attn_implementation(NAME)


def _detach(model: Any) -> None:
    with _lock:
        name, depth = _attached[model]
        _attached[model] = (name, depth - 1)
        if depth > 1:
            return
        cpu_linear.remove(_linears.pop(model, []))
        rope.remove(_ropes.pop(model, []))
        _compiled_inside.discard(model)
        compiled_layers.remove(model)
        if model.config._attn_implementation == NAME:  # else the user has set another one since the last pass
            model.set_attn_implementation(name)
        for config, implementation in _apart.pop(model, []):
            config._attn_implementation = implementation


def _take_over_layers(model: Any) -> list[tuple[Any, str]]:
    """Set our attention in layers that setting the model's implementation did not reach.

    A copied layer has a copy of the configuration, and a layer of another model has that model's.

    Returns:
        (configuration, implementation before) of these layers.
    """
    found: dict[int, tuple[Any, str]] = {}
    for _, module in attention_modules(model):
        config = getattr(module, "config", None)
        before = getattr(config, "_attn_implementation", NAME)
        if config is not None and before != NAME:
            found[id(config)] = config, before or "eager"
            config._attn_implementation = NAME
    return list(found.values())


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
