"""Result folders with made-up figures, written through the code that evaluations use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specache.eval.results import Run, open_results
from specache.eval.tasks.fidelity import Fidelity
from specache.eval.tasks.needle import Needle

KL, SCORE = "KL, nats", "score"
ORIGIN = {"commit": "abc1234", "date": "2026-01-02", "machine": "A processor", "threads": 2, "kernels": "avx512"}
MEMORY = {"full": (1.0, 0.0), "specache": (0.17, 0.08), "kivi": (0.18, 0.0)}

Size = tuple[float, float]  # fast and hot ratio
Values = dict[str, dict[str, list[float]]]  # method -> item -> values


def write_run(
    folder: Path,
    values: Values,
    *,
    unit: str = KL,
    task: Any = None,
    origin: dict[str, Any] | None = ORIGIN,
    facts: dict[str, Any] | None = None,
    memory: Mapping[str, Size | list[Size]] = MEMORY,
    settings: dict[str, Any] | None = None,
    tokens: int | None = 4000,
    **identity: Any,
) -> Path:
    """Write a run of fidelity, or of needles for scores. An item's group is its name up to `/`.

    Args:
        memory: of each method, the same for all items or one per item.
    """
    task = task or (Needle() if unit == SCORE else Fidelity())
    told = {"task": task.name, "settings": task.settings(), "model": "demo", "fingerprint": "f", "dtype": "float32"}
    methods = {label: {"name": label.split()[0], "settings": settings or {"bits": 2}} for label in values}
    run = Run({**told, "specache": "0.1.0", "seed": 0, **identity}, unit, methods, origins=[origin] if origin else [])
    with open_results(folder, run) as results:
        for label, items in values.items():
            for index, (item, series) in enumerate(items.items()):
                sizes = memory[label.split()[0]]
                fast, hot = sizes[index] if isinstance(sizes, list) else sizes
                cell = {"item": item, "group": f"{task.name}/{item.split('/')[0]}", "index": index, "method": label}
                cell |= {"values": series, "tokens": {}, "details": {}, "facts": facts or {}, "seconds": 1.0}
                cell["stats"] = {"fast_ratio": fast, "hot_ratio": hot, "hit_rate": None, "guess_rate": None}
                results.append(cell if tokens is None else {**cell, "prompt_tokens": tokens + 1000 * index})
    return folder
