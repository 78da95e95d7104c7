"""Check transformers' report after loading: a model with missing weights must not answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from specache.errors import SpeCacheError

SHOWN = 3  # most names in a message
_HARMLESS = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|\.attn\.bias|_extra_state|\.num_batches_tracked)$")
_PARAMETER = re.compile(
    r"\.(weight|bias|qweight|qzeros|scales|weight_packed|weight_scale\w*|weight_zero_point|absmax|quant_state\w*)$"
)


class IncompleteModelError(SpeCacheError):
    """Weights are missing, have another shape, or belong to a module that does not exist."""


def check_loaded(model: Any, report: dict[str, Any], source: str, on_note: Callable[[str], None]) -> None:
    """Refuse a model that was not loaded completely, and report unused tensors in its files.

    Args:
        report: second result of `from_pretrained(..., output_loading_info=True)`.
        source: name of the model, for messages.
        on_note: called with a line about unused tensors.

    Raises:
        IncompleteModelError: the message names the first of the tensors.
    """
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise IncompleteModelError(
            f"{source} lacks {_some(missing)}, which {type(model).__name__} needs; transformers fills them with random numbers. "
            "Download it again, or check that config.json belongs to these weights."
        )
    mismatched = sorted(
        f"{name} ({list(found)} in the files, {list(wanted)} in the model)"
        for name, found, wanted in report.get("mismatched_keys") or ()
    )
    if mismatched:
        raise IncompleteModelError(
            f"{source} has tensors of another shape than {type(model).__name__}: {_some(mismatched)}. Check that config.json "
            "belongs to these weights."
        )
    if errors := list(report.get("error_msgs") or ()):
        raise IncompleteModelError(f"{source} cannot be loaded whole: {_some(errors)}")
    unexpected = sorted(name for name in report.get("unexpected_keys") or () if not _HARMLESS.search(name))
    wrong = [name for name in unexpected if _belongs_inside(model, name)]
    if wrong:
        raise IncompleteModelError(
            f"{source} has {_some(wrong)}, for which {type(model).__name__} has no place: without them it is another model. "
            "Check that config.json belongs to these weights (number of layers, biases, quantisation)."
        )
    if unexpected:
        on_note(f"Not used of {source}: {_some(unexpected)}")


def _belongs_inside(model: Any, name: str) -> bool:
    """Return True if a tensor belongs to an additional layer, or is missing in a module."""
    from torch import nn  # here: commands that need no model do not wait for PyTorch

    parent, _, _ = name.rpartition(".")
    parts = parent.split(".")
    for depth in range(len(parts), 0, -1):
        module = _submodule(model, ".".join(parts[:depth]))
        if module is None:
            continue
        if isinstance(module, nn.ModuleList):
            return True
        return depth == len(parts) and bool(_PARAMETER.search(name)) and not isinstance(module, nn.ModuleDict)
    return False


def _submodule(model: Any, path: str) -> Any:
    """Return a module by its path in the files, with or without the decoder's prefix."""
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    return None


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")
