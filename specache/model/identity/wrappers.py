"""Find the module that computes inside users' wrappers: torch.compile, data parallelism, peft."""

from __future__ import annotations

import sys
from typing import Any

from torch.nn.parallel import DataParallel, DistributedDataParallel

from specache.errors import UnsupportedModelError

_HARMLESS_TUNERS = {"AdaLoraModel"}  # their forward pass only adds a training loss


def unwrapped(model: Any) -> Any:
    """Return the module inside torch.compile, data parallelism and peft, nested in any order.

    All checks of a model's identity use this module, so that a wrapper and its content count as
    one.

    Raises:
        UnsupportedModelError: a wrapper adds computation of its own (prompt and prefix tuning).
    """
    while True:
        inner = _inner(model)
        if inner is None:
            _refuse_borrowed_prompt(model)
            return model
        model = inner


def is_compiled_inside(model: Any) -> bool:
    """Return True if the model (`model.compile()`), its `forward`, or some layers are compiled."""
    return any(
        _is_compiled(module)
        or module._compiled_call_impl is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def _is_compiled(module: Any) -> bool:
    """Return True for the result of `torch.compile`, whose class has no public name."""
    return any(kind.__name__ == "OptimizedModule" for kind in type(module).__mro__) and hasattr(module, "_orig_mod")


def _inner(model: Any) -> Any:
    """Return the content of a wrapper, or None for another module."""
    if _is_compiled(model):
        return model._orig_mod
    if isinstance(model, DataParallel | DistributedDataParallel):
        return model.module
    if type(model).__name__ == "FullyShardedDataParallel":
        raise UnsupportedModelError(
            "The model is wrapped in FullyShardedDataParallel, which holds a part of every weight. Load it whole, without FSDP."
        )
    return _inside_peft(model)


def _inside_peft(model: Any) -> Any:
    """Return the content of a model or tuner of peft, or None. peft is not imported for it."""
    peft = sys.modules.get("peft")
    if peft is None or not hasattr(peft, "PeftModel"):
        return None
    if isinstance(model, peft.PeftModel):
        refuse_prompt_learning(model)
        return model.base_model
    if isinstance(model, peft.PeftMixedModel):
        return model.base_model
    if _is_tuner(model):
        _refuse_tuner(model)
        return model.model
    return None


def _is_tuner(model: Any) -> bool:
    """Return True for peft's object between a PeftModel and the transformers model."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    is_tuner = tuners is not None and isinstance(model, tuners.BaseTuner)
    return is_tuner or type(model).__name__ == "AdaptionPromptModel"


def refuse_prompt_learning(model: Any) -> None:
    """Refuse a PeftModel that puts learned vectors in front of the prompt.

    Raises:
        UnsupportedModelError: its active adapter uses prompt or prefix tuning, and is not disabled.
    """
    config = model.peft_config.get(model.active_adapter) if isinstance(model.active_adapter, str) else None
    if getattr(config, "is_prompt_learning", False) and not getattr(model, "_adapters_disabled", False):
        kind = str(getattr(config, "peft_type", "prompt learning")).removeprefix("PeftType.")
        raise UnsupportedModelError(
            f"The active adapter {model.active_adapter!r} of this PeftModel is of type {kind}: it puts learned vectors in front of "
            "the prompt or its keys and values, and specache knows its sequences by their token ids. Use it with the model's stock "
            "generate(), or use the model without it: inside `with model.disable_adapter():`."
        )


def _refuse_tuner(tuner: Any) -> None:
    """Refuse tuners whose own forward pass controls the adapters inside the model."""
    base = sys.modules["peft.tuners.tuners_utils"].BaseTuner
    own = isinstance(tuner, base) and type(tuner).forward is not base.forward
    if own and type(tuner).__name__ not in _HARMLESS_TUNERS:
        raise UnsupportedModelError(
            f"peft's {type(tuner).__name__} decides in a forward pass of its own what its adapters do; specache does not run it. "
            "Use the model's stock generate(), or an adapter that lies in the model's layers, such as LoRA."
        )


def _refuse_borrowed_prompt(model: Any) -> None:
    """Refuse a model whose prompt-tuning wrapper is generating.

    PeftModel.generate replaces the model's own preparation of inputs.
    """
    peft = sys.modules.get("peft")
    prepare = getattr(model, "__dict__", {}).get("prepare_inputs_for_generation")
    owner = getattr(prepare, "__self__", None)
    if peft is not None and hasattr(peft, "PeftModel") and isinstance(owner, peft.PeftModel):
        refuse_prompt_learning(owner)
