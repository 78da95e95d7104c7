"""Compile a roofline's results for a model on a device as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specache.planning.roofline.capacity import Capacity
from specache.planning.roofline.compared_methods import Method
from specache.planning.roofline.step_time import StepModel
from specache.planning.roofline.tipping import tipping


def roofline_document(model: StepModel, capacity: Capacity, compared: Sequence[Method], context: int, batch: int) -> dict[str, Any]:
    """Return the comparison. Keys are stable; sizes are bytes, times milliseconds.

    Args:
        compared: the methods, the full cache first.
    """
    found = [_measures(model, capacity, method, context, batch) for method in compared]
    full = found[0]
    for one in found:
        one["vs_full"] = {
            "batch": _ratio(one["largest"]["batch"], full["largest"]["batch"]),
            "tokens_per_s": _ratio(one["largest"]["tokens_per_s"], full["largest"]["tokens_per_s"]),
            "step": _ratio(full["asked"]["step"]["total_ms"], one["asked"]["step"]["total_ms"]),
        }
    for one, method in zip(found[1:], compared[1:], strict=True):
        one["wins_from"] = tipping(model, capacity, compared[0], method, context, batch).to_dict()
    full["wins_from"] = None
    return {"device": capacity.device.to_dict(), "usable_bytes": capacity.device.usable_bytes, "methods": found}


def _measures(model: StepModel, capacity: Capacity, method: Method, context: int, batch: int) -> dict[str, Any]:
    largest = capacity.largest_batch(method, context)
    return {
        **method.to_dict(),
        "asked": {**_at(model, capacity, method, context, batch), "fits": capacity.fits(method, context, batch)},
        "largest": _at(model, capacity, method, context, largest) if largest else {"batch": 0, "tokens_per_s": None, "step": None},
    }


def _at(model: StepModel, capacity: Capacity, method: Method, context: int, batch: int) -> dict[str, Any]:
    step = model.step(method, context, batch)
    return {
        "batch": batch,
        **capacity.bytes(method, context, batch).to_dict(),
        "step": step.to_dict(),
        "tokens_per_s": batch / step.total,
    }


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value and base else None
