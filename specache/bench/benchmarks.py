"""Every benchmark by name. A new one is one file and one line here; nothing is imported before it is asked for."""

from __future__ import annotations

from typing import Any

from specache.platform.registry import named_class

BENCHMARKS = {
    "attention": "specache.bench.attention_layer:Attention",
    "decode": "specache.bench.decode_step:Decode",
    "prefill": "specache.bench.prefill:Prefill",
    "scaling": "specache.bench.scaling:Scaling",
    "tiers": "specache.bench.tiers:Tiers",
    "memory": "specache.bench.memory:Memory",
    "paper": "specache.bench.paper:Paper",
}


def benchmark_class(name: str) -> Any:
    """The benchmark's class.

    Raises:
        ConfigError: there is none of this name.
    """
    return named_class(BENCHMARKS, name, "benchmark")
