"""The registry of benchmarks by name.

A new benchmark is one file and one line here. A benchmark's module is imported only when it is
asked for.
"""

from __future__ import annotations

from typing import Any

from specache.platform.registry import named_class

BENCHMARKS = {
    "attention": "specache.bench.attention_layer:Attention",
    "products": "specache.bench.products:Products",
    "decode": "specache.bench.decode_step:Decode",
    "prefill": "specache.bench.prefill:Prefill",
    "scaling": "specache.bench.scaling:Scaling",
    "tiers": "specache.bench.tiers:Tiers",
    "memory": "specache.bench.memory:Memory",
    "serve": "specache.bench.serve:Serve",
    "structured": "specache.bench.structured:Structured",
    "paper": "specache.bench.paper:Paper",
}


def benchmark_class(name: str) -> Any:
    """Return the class of the benchmark `name`.

    Raises:
        ConfigError: no benchmark has this name.
    """
    return named_class(BENCHMARKS, name, "benchmark")
