"""How a model's weights are stored (`weights` makes them so)."""

from __future__ import annotations

from enum import StrEnum


class WeightFormat(StrEnum):
    """Number format of a model's weights. `auto`: that of its activations."""

    AUTO = "auto"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
