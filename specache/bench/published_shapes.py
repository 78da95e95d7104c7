"""Published dimensions of larger models than those of `shapes`, for a GPU or for the planner."""

from __future__ import annotations

from typing import Any

from specache.bench.shapes import SHAPES, Shape
from specache.errors import ConfigError

PUBLISHED = (
    Shape("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32000, 1_000_000.0, False),  # Instruct-v0.2: no sliding window
    Shape("llama-2-7b", 32, 4096, 11008, 32, 32, 128, 32000, 10_000.0, False),
    Shape("llama-2-13b", 40, 5120, 13824, 40, 40, 128, 32000, 10_000.0, False),
    Shape("llama-3.1-70b", 80, 8192, 28672, 64, 8, 128, 128256, 500_000.0, False),
    Shape("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, 152064, 1_000_000.0, False),
    Shape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936, 1_000_000.0, False),
)
NAMES = (*SHAPES, *(shape.name for shape in PUBLISHED))


def shape_of(name: str) -> Shape:
    """Return a shape by name, from `SHAPES` or `PUBLISHED`.

    Raises:
        ConfigError: no shape has this name.
    """
    shape = SHAPES.get(name) or next((shape for shape in PUBLISHED if shape.name == name), None)
    if shape is None:
        raise ConfigError(f"--shape must be one of {', '.join(NAMES)}, got {name!r}.")
    return shape


def planned_config(name: str) -> Any:
    """Return transformers' configuration of a shape (see `shape_of`)."""
    return shape_of(name).config()
