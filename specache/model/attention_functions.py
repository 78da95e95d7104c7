"""The attention and mask functions that a model's user has chosen, which specache's replace.

Those of transformers compute the same as specache's, faster or slower. A function that somebody
else registered may compute anything, and would be ignored.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specache.errors import UnsupportedModelError
from specache.model.function_origin import described, is_from_library
from specache.model.per_layer import attention_modules


def refuse_replaced_attention(model: Any) -> None:
    """Refuse a model whose attention or mask is computed by a function of its user.

    Attention implementations of the hub, whose names contain a slash, compute ordinary attention.

    Raises:
        UnsupportedModelError: names the function.
    """
    for setting in {getattr(config, "_attn_implementation", None) for config in (model.config, model.config.get_text_config())}:
        if not isinstance(setting, str) or "/" in setting:
            continue
        attention = _eager(model) if setting == "eager" else ALL_ATTENTION_FUNCTIONS.get(setting)
        for what, function in (("attention", attention), ("mask", ALL_MASK_ATTENTION_FUNCTIONS.get(setting))):
            if function is not None and not is_from_library(function):
                raise UnsupportedModelError(
                    f"{type(model).__name__} computes its {what} by {described(function)} (attn_implementation={setting!r}), which "
                    "is not transformers'. specache's attention takes its place, so what that function does would be ignored. "
                    "Call model.set_attn_implementation('sdpa') if it is ordinary causal attention, or use the model's stock "
                    "generate()."
                )


def _eager(model: Any) -> Any:
    """Return the function of `eager` in transformers' own modelling code, or `None`.

    Code from elsewhere has one of its own, whose arguments are checked when it is called.
    """
    for _, module in attention_modules(model):
        code = inspect.getmodule(type(module))
        known = code is not None and code.__name__.startswith("transformers.")
        return getattr(code, "eager_attention_forward", None) if known else None
    return None
