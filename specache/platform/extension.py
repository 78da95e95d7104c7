"""The C++ extension, if it is installed, and its instruction sets that this processor runs."""

from __future__ import annotations

import importlib
from typing import Any

import torch

native: Any = None
IMPORT_ERROR: str | None = None  # why the extension could not be imported
try:
    native = importlib.import_module("specache._native")
except ImportError as error:  # installed without a compiler
    IMPORT_ERROR = str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types as the extension numbers them."""


def instruction_sets() -> list[str]:
    """Return the instruction sets of the extension that this processor runs, slowest first.

    Empty without the extension.
    """
    return list(native.available()) if native is not None else []
