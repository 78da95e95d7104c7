"""All private operations of PyTorch that this package calls, with fallbacks for releases without
them.

No other file calls them, and a test runs every fallback. Documented interfaces (`torch.library`,
`torch.compiler`, `torch.backends.cuda.can_use_flash_attention`) and operators of our own
(`torch.ops.specache`) are not listed here.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

FALLBACKS = {
    "ops.aten._scaled_dot_product_flash_attention_for_cpu": "exact attention in plain operations, a block of scores at a time",
    "ops.aten._scaled_dot_product_flash_attention": "exact attention in plain operations, a block of scores at a time",
    "ops.mkldnn._is_mkldnn_bf16_supported": "the processor is taken to have no fast products in 16 bits",
    "ops.mkldnn._is_mkldnn_fp16_supported": "the processor is taken to have no fast products in 16 bits",
    "cpu._is_avx512_bf16_supported": "oneDNN is asked",
    "cpu._is_amx_tile_supported": "oneDNN is asked, or there are taken to be no matrix registers",
    "_dynamo.mark_static": "the compiler runs again when the number of rows changes",
    "_dynamo.maybe_mark_dynamic": "the compiler runs again when the number of sequences changes",
    "_dynamo.exc.TorchDynamoException": "any RuntimeError counts as one of the compiler's",
    "_inductor.list_options": "the compiler runs with its default options, and starts slower",
    "utils._python_dispatch.TorchDispatchMode": "decode steps run layer by layer in Python",
    "overrides._get_current_function_mode_stack": "a mode of functions does not keep a step from being recorded",
    "utils._python_dispatch._get_current_dispatch_mode_stack": "a mode of operations does not keep a step from being recorded",
    "nn.modules.module._has_any_global_hook": "hooks on all modules do not keep a step from being recorded",
    "nn.modules.module._global_forward_pre_hooks": "hooks on all modules see draft tokens beside the real ones",
    "nn.modules.module._global_forward_hooks": "hooks on all modules see draft tokens beside the real ones",
    "_inductor.utils.clear_caches": "code that the compiler wrote elsewhere before stays in use beside a folder of ours",
}
_X86 = ("x86_64", "amd64")
COMPILER_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def find(path: str) -> Any | None:
    """Return the operation `torch.<path>`, a key of `FALLBACKS`, or None if this PyTorch does not
    have it.
    """
    if path not in _found:
        _found[path] = _look_up(path)
    return _found[path]


def _look_up(path: str) -> Any | None:
    assert path in FALLBACKS, path
    found: Any = torch
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except (AttributeError, ImportError, RuntimeError):  # `torch.ops` raises any of these
            return None
    return found


def missing_operations() -> list[str]:
    """Return the operations that the installed PyTorch does not have."""
    return [path for path in FALLBACKS if find(path) is None]


# Attention


def flash_attention_cpu(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, causal: bool, scaling: float
) -> tuple[Tensor, Tensor] | None:
    """Return attention of query [1, Hq, n, D] over keys and values [1, Hkv, T, D] and its
    log-sum-exp; None if unavailable.
    """
    attend = find("ops.aten._scaled_dot_product_flash_attention_for_cpu")
    if attend is None:
        return None
    out, lse = attend(query, keys, values, 0.0, causal, attn_mask=bias, scale=scaling)
    return out, lse


def flash_attention_cuda(query: Tensor, keys: Tensor, values: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor] | None:
    """Do the same on CUDA, without a bias. Raise `RuntimeError` if the GPU does not support it."""
    attend = find("ops.aten._scaled_dot_product_flash_attention")
    if attend is None:
        return None
    out, lse, *_ = attend(query, keys, values, 0.0, causal, scale=scaling)
    return out, lse


# Modules


def dispatch_mode() -> type[Any] | None:
    """Return the base of modes that see every operation, None if unavailable."""
    mode: type[Any] | None = find("utils._python_dispatch.TorchDispatchMode")
    return mode


def has_global_hooks() -> bool:
    """Return whether hooks on all modules are registered."""
    ask = find("nn.modules.module._has_any_global_hook")
    return ask is not None and bool(ask())


def global_hooks() -> list[Any]:
    """Return the forward hooks of all modules of the process."""
    found = (find(f"nn.modules.module._global_forward_{kind}") for kind in ("pre_hooks", "hooks"))
    return [hook for hooks in found if hooks is not None for hook in hooks.values()]


def has_modes() -> bool:
    """Return whether modes see this thread's functions or operations (default devices aside)."""
    stacks = ("overrides._get_current_function_mode_stack", "utils._python_dispatch._get_current_dispatch_mode_stack")
    return any(type(mode).__name__ != "DeviceContext" for path in stacks if (ask := find(path)) is not None for mode in ask())


# Processor features


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Return True if oneDNN, PyTorch's CPU backend, has fast products of this 16-bit type here.

    With AVX-512 oneDNN accepts bfloat16 on processors without instructions for it, where a product
    of many rows takes four times as long as in float32.
    """
    kind = "bf16" if dtype is torch.bfloat16 else "fp16"
    emulated = dtype is torch.bfloat16 and platform.machine().lower() in _X86 and _bfloat16_instructions() is False
    return not emulated and _is_supported(f"ops.mkldnn._is_mkldnn_{kind}_supported")


def has_bfloat16_instructions() -> bool:
    """Return True if the CPU has bfloat16 matrix instructions that PyTorch uses."""
    known = _bfloat16_instructions()
    return multiplies_natively(torch.bfloat16) if known is None else known


def _bfloat16_instructions() -> bool | None:
    """Return whether an x86 processor has bfloat16 instructions; None if PyTorch cannot tell."""
    asked = ("cpu._is_avx512_bf16_supported", "cpu._is_amx_tile_supported")
    if all(find(path) is None for path in asked):
        return None
    return any(_is_supported(path) for path in asked)


@cache
def has_matrix_registers() -> bool:
    """Return True if the CPU has matrix registers (AMX) that PyTorch uses."""
    return _is_supported("cpu._is_amx_tile_supported")


def _is_supported(path: str) -> bool:
    ask = find(path)
    try:
        return ask is not None and bool(ask())
    except RuntimeError:  # built without oneDNN
        return False


# The compiler


def fix_size(tensor: Tensor, dimension: int) -> None:
    """Make the compiler specialise its graph on this size of a dimension."""
    if mark := find("_dynamo.mark_static"):
        mark(tensor, dimension)


def free_size(tensor: Tensor, dimension: int) -> None:
    """Make the compiler build one graph for all sizes of a dimension, if it can."""
    if mark := find("_dynamo.maybe_mark_dynamic"):
        mark(tensor, dimension)


def compiler_error() -> type[Exception]:
    """Return the type of error that the compiler raises when it cannot compile."""
    error: type[Exception] = find("_dynamo.exc.TorchDynamoException") or RuntimeError
    return error


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return those options that this PyTorch's compiler has."""
    listed = find("_inductor.list_options")
    known = set() if listed is None else set(listed())
    return {name: value for name, value in options.items() if name in known}


@contextmanager
def compiler_folder(folder: str) -> Iterator[None]:
    """Have the compiler read and write its files in this folder inside the block.

    The folder is the whole process's: nothing else should compile meanwhile.
    """
    before = os.environ.get(COMPILER_FOLDER)
    clear = find("_inductor.utils.clear_caches")
    os.environ[COMPILER_FOLDER] = folder
    try:
        if clear is not None:
            clear()  # it remembers paths
        yield
    finally:
        if before is None:
            os.environ.pop(COMPILER_FOLDER, None)
        else:
            os.environ[COMPILER_FOLDER] = before
        if clear is not None:
            clear()


# `_dynamo` and `_inductor` are looked up on demand: importing them is slow
_found: dict[str, Any] = {path: _look_up(path) for path in FALLBACKS if not path.startswith(("_dynamo", "_inductor"))}
