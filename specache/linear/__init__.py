"""Matrix products with a model's weights on a CPU."""

from __future__ import annotations


def kernel_names() -> dict[str, str]:
    """Return number format of weights -> what multiplies them on this CPU, in words."""
    from specache.linear import active_kernels  # imports PyTorch

    return active_kernels.kernel_names()
