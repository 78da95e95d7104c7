"""All private operations of PyTorch that this package calls, with fallbacks for releases without
them.

No other file calls them, and a test runs every fallback. Documented interfaces (`torch.library`,
`torch.compiler`, `torch.backends.cuda.can_use_flash_attention`) and operators of our own
(`torch.ops.specache`) are not listed here.

Symbols: `N` outputs, `K` inputs of a linear layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

FALLBACKS = {
    "ops.aten._scaled_dot_product_flash_attention_for_cpu": "exact attention in plain operations, a block of scores at a time",
    "ops.aten._scaled_dot_product_flash_attention": "exact attention in plain operations, a block of scores at a time",
    "ops.aten._weight_int8pack_mm": "the matrix is formed from its codes, a block of outputs at a time",
    "ops.aten._convert_weight_to_int4pack_for_cpu": "codes are packed in an order of our own, and the matrix formed from them",
    "ops.aten._weight_int4pack_mm_for_cpu": "the matrix is formed from its codes, a block of outputs at a time",
    "ops.mkldnn._is_mkldnn_bf16_supported": "the processor is taken to have no fast products in 16 bits",
    "ops.mkldnn._is_mkldnn_fp16_supported": "the processor is taken to have no fast products in 16 bits",
    "cpu._is_avx512_bf16_supported": "oneDNN is asked",
    "cpu._is_amx_tile_supported": "oneDNN is asked",
    "_dynamo.mark_static": "the compiler runs again when the number of rows changes",
    "_dynamo.maybe_mark_dynamic": "the compiler runs again when the number of sequences changes",
    "_dynamo.exc.TorchDynamoException": "any RuntimeError counts as one of the compiler's",
    "_inductor.list_options": "the compiler runs with its default options, and starts slower",
    "_inductor.utils.clear_caches": "code that the compiler wrote elsewhere before stays in use beside a folder of ours",
}
OUR_BLOCK = 16  # outputs packed together if PyTorch packs none; packed layers have a multiple of it
FORMED_ELEMENTS = 1 << 20  # matrix elements dequantised at a time
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


# Products with quantised weights


def int8_product(rows: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return the product [M, N] of rows [M, K] and codes int8 [N, K] with one scale per output
    [N].
    """
    product = find("ops.aten._weight_int8pack_mm")
    if product is not None:
        out: Tensor = product(rows, codes, scales)
        return out
    out = rows.new_empty(len(rows), len(codes))
    step = max(FORMED_ELEMENTS // codes.shape[1], 1)
    for start in range(0, len(codes), step):
        part = slice(start, start + step)
        out[:, part] = linear(rows, codes[part].to(rows.dtype)) * scales[part]
    return out


def pack_int4(codes: Tensor) -> tuple[Tensor, int | None]:
    """Pack codes int32 [N, K], N a multiple of 16.

    Returns:
        packed uint8 [N, K / 2], and the block with which `unpack_int4` undoes it; None for an
            unknown order of PyTorch's.
    """
    convert = find("ops.aten._convert_weight_to_int4pack_for_cpu")
    if convert is None or find("ops.aten._weight_int4pack_mm_for_cpu") is None:
        return _pack_int4(codes, OUR_BLOCK), OUR_BLOCK
    packed: Tensor = convert(codes, 1)
    known = (64, 32)  # AVX-512, AVX2
    block = next((b for b in known if len(codes) % b == 0 and torch.equal(unpack_int4(packed, b).int(), codes)), None)
    return packed, block


def unpack_int4(packed: Tensor, block: int) -> Tensor:
    """Return uint8 codes [N, K].

    Of `block` outputs, byte j of an input packs outputs j and j + block / 2.
    """
    outputs, inputs = packed.shape[0], packed.shape[1] * 2
    each = packed.view(outputs // block, inputs, block // 2)
    return torch.cat([each & 15, each >> 4], dim=-1).transpose(1, 2).reshape(outputs, inputs)


def _pack_int4(codes: Tensor, block: int) -> Tensor:
    outputs, inputs = codes.shape
    each = codes.to(torch.uint8).view(outputs // block, block, inputs).transpose(1, 2)  # [N / block, K, block]
    low, high = each.split(block // 2, dim=-1)
    return (low | high << 4).reshape(outputs, inputs // 2)


def int4_matrix(packed: Tensor, block: int, scales_and_zeros: Tensor) -> Tensor:
    """Return the matrix [N, K] of packed codes with scales and zeros [K / g, N, 2]: (code - 8) *
    scale + zero.
    """
    scales, zeros = scales_and_zeros.transpose(0, 1).unsqueeze(-1).unbind(2)  # [N, K / g, 1]
    codes = unpack_int4(packed, block).unflatten(1, (scales.shape[1], -1))
    return torch.addcmul(zeros, codes.to(scales.dtype).sub_(8), scales).flatten(1)


def int4_product(rows: Tensor, packed: Tensor, block: int | None, group: int, scales_and_zeros: Tensor) -> Tensor:
    """Return the product [M, N] of rows [M, K] and the matrix of `int4_matrix`.

    Args:
        packed, block: results of `pack_int4`.
        group: inputs that share a scale.
    """
    product = find("ops.aten._weight_int4pack_mm_for_cpu")
    if product is not None and block != OUR_BLOCK:
        out: Tensor = product(rows, packed, group, scales_and_zeros)
        return out
    assert block is not None, "an order that only PyTorch's product knows"
    out = rows.new_empty(len(rows), len(packed))
    step = max(FORMED_ELEMENTS // (2 * packed.shape[1]) // block, 1) * block
    for start in range(0, len(packed), step):
        part = slice(start, start + step)
        out[:, part] = linear(rows, int4_matrix(packed[part], block, scales_and_zeros[:, part]))
    return out


# Processor features


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Return True if oneDNN, PyTorch's CPU backend, has fast products of this 16-bit type here."""
    kind = "bf16" if dtype is torch.bfloat16 else "fp16"
    return _is_supported(f"ops.mkldnn._is_mkldnn_{kind}_supported")


def has_bfloat16_instructions() -> bool:
    """Return True if the CPU has bfloat16 matrix instructions that PyTorch uses."""
    asked = ("cpu._is_avx512_bf16_supported", "cpu._is_amx_tile_supported")
    if all(find(path) is None for path in asked):
        return multiplies_natively(torch.bfloat16)
    return any(_is_supported(path) for path in asked)


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
