"""Number formats of a model's weights (`weight_quant` converts to them)."""

from __future__ import annotations

from enum import StrEnum


class WeightFormat(StrEnum):
    """Number format of a model's weights. `auto`: the dtype of its activations."""

    AUTO = "auto"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
