"""Isolate passes from RoPE state that depends on the length (`dynamic`, `longrope`).

transformers keeps the frequencies, and the largest length seen, in the model's rotary modules,
where one sequence or thread would affect another. While the model is attached, a pass of this
package starts from the original frequencies and restores the state afterwards, and one thread at a
time runs a rotary module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from specache.platform import forks

FREQUENCIES = "inv_freq"  # name of a buffer, or its suffix if kinds of layers have their own
LENGTH = "max_seq_len_cached"
ORIGINAL = "original_"

_lock = forks.reentrant_lock()


def install(model: Any, is_ours: Callable[[], bool]) -> list[nn.Module]:
    """Make the model's rotary modules isolate passes, and return the changed modules for `remove`.

    Args:
        is_ours: returns True if the calling thread is inside a pass of this package.
    """
    changed = []
    forward = _guarded(is_ours)
    for module in model.modules():
        if _depends_on_length(module) and "forward" not in module.__dict__:
            module.forward = MethodType(forward, module)
            changed.append(module)
    return changed


def remove(modules: list[nn.Module]) -> None:
    """Undo `install`."""
    for module in modules:
        module.__dict__.pop("forward", None)


def is_installed(module: nn.Module) -> bool:
    """Return True if the module isolates passes now."""
    return getattr(module.__dict__.get("forward"), "keeps_passes_apart", False)


def forget_length(module: nn.Module) -> None:
    """Reset a rotary module to its original frequencies, as if it had seen no sequence yet."""
    longest = getattr(module, "original_max_seq_len", None)
    for name, buffer in list(module._buffers.items()):
        original = getattr(module, _original_of(name), None) if name.endswith(FREQUENCIES) and ORIGINAL not in name else None
        if original is not None and buffer is not None:
            module._buffers[name] = original.to(buffer.device, copy=True)  # longrope writes into it
    for name in list(module.__dict__):
        if name.endswith(LENGTH):
            module.__dict__[name] = longest


def _guarded(is_ours: Callable[[], bool]) -> Callable[..., Any]:
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        rotate = type(module).forward
        with _lock:
            if not is_ours():
                return rotate(module, *args, **kwargs)
            with _state_restored(module):
                forget_length(module)
                return rotate(module, *args, **kwargs)

    forward.keeps_passes_apart = True  # type: ignore[attr-defined]
    return forward


@contextmanager
def _state_restored(module: nn.Module) -> Iterator[None]:
    buffers = dict(module._buffers)
    attributes = {name: value for name, value in module.__dict__.items() if name.endswith((LENGTH, "attention_scaling"))}
    try:
        yield
    finally:
        module._buffers.clear()
        module._buffers.update(buffers)
        module.__dict__.update(attributes)


def _depends_on_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)


def _original_of(name: str) -> str:
    return f"{name.removesuffix(FREQUENCIES)}{ORIGINAL}{FREQUENCIES}"
