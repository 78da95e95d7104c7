"""Results in bfloat16 have the bits of PyTorch's rounding, with every instruction set."""

from __future__ import annotations

import pytest
import torch

from specache.linear import native_products as products
from specache.platform import extension

pytestmark = pytest.mark.skipif(not extension.instruction_sets(), reason=f"the C++ kernels are not built: {extension.IMPORT_ERROR}")


@pytest.mark.usefixtures("isa")
def test_results_in_bfloat16_are_rounded_as_pytorch_does():
    """Sums of two numbers each: ties, what rounds to infinity, infinity and NaN among them."""
    torch.manual_seed(5)
    special = torch.tensor([[1.0, 2**-8], [1 + 2**-7, 2**-8], [3.38e38, 3.38e38], [3.38e38, 6e35], [1e-39, 1e-40]])
    special = torch.cat([special, torch.tensor([[float("inf"), 1.0], [float("-inf"), float("inf")], [float("nan"), 1.0]])])
    weight = torch.cat([special, torch.randn(4000, 2) * torch.tensor([1.0, 2**-7])]).bfloat16()
    out = products.plain_linear(torch.ones(1, 2, dtype=torch.bfloat16), weight, None)[0]
    torch.testing.assert_close(out, weight.float().sum(1).bfloat16(), rtol=0, atol=0, equal_nan=True)
