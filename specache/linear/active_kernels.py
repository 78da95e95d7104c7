"""Names of the products in use on this CPU, for `specache doctor`."""

from __future__ import annotations

import torch

from specache.linear import native_products
from specache.linear.cpu_linear import MOST_FEW_ROWS, widens
from specache.platform import private_torch

_PYTORCH = "PyTorch's"


def kernel_names() -> dict[str, str]:
    """Return number format of weights -> what multiplies them, in words."""
    return {
        "fp32": _plain(torch.float32),
        "bf16": _plain(torch.bfloat16),
        "fp16": _plain(torch.float16),
        "int8": _packed(),
        "int4": _packed(),
    }


def _plain(dtype: torch.dtype) -> str:
    isa = native_products.instruction_set()
    many = f"{_PYTORCH} widened to float32" if widens(dtype) else _PYTORCH
    return many if isa is None else f"{isa} up to {MOST_FEW_ROWS} rows, then {many}"


def _packed() -> str:
    isa = native_products.instruction_set()
    if isa is None:
        return f"the matrix formed from its codes, then {_PYTORCH}"
    if private_torch.has_matrix_registers():
        most = native_products.MANY_ROWS - 1
        return f"{isa}, in bfloat16 up to {most} rows, then {_PYTORCH} over the matrix formed from its codes"
    return isa
