"""Every benchmark by name. A new one is one file and one line here; nothing is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from specache.errors import ConfigError

BENCHMARKS = {
    "attention": "specache.bench.attention:Attention",
    "decode": "specache.bench.decode:Decode",
    "prefill": "specache.bench.prefill:Prefill",
    "scaling": "specache.bench.scaling:Scaling",
}


def benchmark_class(name: str) -> Any:
    """The benchmark's class.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"There is no benchmark {name!r}. Known: {', '.join(BENCHMARKS)}.")
    module, attribute = BENCHMARKS[name].split(":")
    return getattr(import_module(module), attribute)
