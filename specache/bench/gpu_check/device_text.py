"""The planner's figures of a device, as they were measured."""

from __future__ import annotations

from typing import Any


def device_text(facts: dict[str, Any]) -> str:
    """Return a file for `specache plan --gpu-spec` with the measured figures.

    Args:
        facts: `rates` and `gpu` (name, memory_bytes, vector_tflops, its source) of part 5.
    """
    rates, gpu = facts["rates"], facts["gpu"]
    link = max(rates["to_device_gb_per_s"], rates["gather_gb_per_s"])
    measured = "measured by specache.bench.gpu_check"
    return "\n".join(
        [
            f"# {gpu['name']}: {measured}. specache plan -m MODEL --context N --gpu-spec THIS_FILE",
            "# The rates are what was reached, so their efficiencies are 1. docs/plan.md says what each figure means.",
            f'name = "{gpu["name"]} ({measured})"',
            f"memory_gib = {gpu['memory_bytes'] / 2**30:.1f}",
            f"memory_gb_per_s = {max(rates['read_gb_per_s'], rates['copy_gb_per_s']):.0f}",
            f"matrix_tflops = {rates['matrix_tflops']:.4g}",
            f"vector_tflops = {gpu['vector_tflops']:.4g}",
            f"link_gb_per_s = {link:.4g}",
            f'source = "{measured}"',
            f'sources.vector_tflops = "{gpu["vector_source"]}"',
            "",
            "[efficiency]",
            "memory = 1.0",
            "matrix = 1.0",
            f"link = {min(1.0, rates['gather_gb_per_s'] / link):.3g}  # rows gathered by a kernel, against whole copies",
            "",
        ]
    )
