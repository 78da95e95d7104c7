"""Names of the products in use on this CPU, for `specache doctor`."""

from __future__ import annotations

import torch

from specache.linear.cpu_linear import FEWEST_MANY_ROWS, MOST_FEW_ROWS, widens
from specache.linear.weight_quant import INT4_MANY_ROWS, INT8_MANY_ROWS
from specache.platform import private_torch

_PYTORCH = "PyTorch's"


def kernel_names() -> dict[str, str]:
    """Return number format of weights -> what multiplies them, in words."""
    return {
        "fp32": f"MKL with exchanged operands up to {MOST_FEW_ROWS} rows, {_PYTORCH}"
        if torch.backends.mkl.is_available()
        else _PYTORCH,
        "bf16": _sixteen_bits(torch.bfloat16),
        "fp16": _sixteen_bits(torch.float16),
        "int8": _quantised("ops.aten._weight_int8pack_mm", INT8_MANY_ROWS),
        "int4": _quantised("ops.aten._weight_int4pack_mm_for_cpu", INT4_MANY_ROWS),
    }


def _sixteen_bits(dtype: torch.dtype) -> str:
    return f"{_PYTORCH}, from {FEWEST_MANY_ROWS} rows on widened to float32" if widens(dtype) else _PYTORCH


def _quantised(operation: str, many_rows: int) -> str:
    if private_torch.find(operation) is None:
        return f"the matrix formed from its codes, then {_PYTORCH}"
    return f"{operation.removeprefix('ops.')}, from {many_rows} rows on the matrix formed from its codes"
