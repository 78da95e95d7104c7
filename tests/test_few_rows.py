"""Float32 linear layers over few rows: the same products, only while a model is ours to run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specache import few_rows
from specache.integration import attached
from tests.tiny import llama

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch was built without MKL")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 2, 48), (4, 2, 48), (3, 3, 48), (0, 48), (48,)])
def test_products_are_those_of_the_ordinary_layer(bias, shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80, bias=bias), torch.randn(shape)
    expected = layer(x)
    layers = few_rows.install(nn.Sequential(layer))
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == expected.shape and layer(x).is_contiguous()
    few_rows.remove(layers)
    assert torch.equal(layer(x), expected)


def test_a_row_gives_the_same_numbers_alone_and_beside_another():
    torch.manual_seed(0)
    layer, x = nn.Linear(576, 192, bias=False), torch.randn(1, 2, 576)
    few_rows.install(nn.Sequential(layer))
    torch.testing.assert_close(layer(x[:, :1]), layer(x)[:, :1], rtol=1e-6, atol=1e-6)


def test_only_float32_layers_that_nobody_else_replaced():
    half, hooked, derived = nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8), type("Other", (nn.Linear,), {})(8, 8)
    hooked.forward = hooked.forward  # as accelerate's hooks do
    assert few_rows.install(nn.ModuleList([half, hooked, derived])) == []
    assert "forward" in hooked.__dict__


def test_a_model_is_itself_again_after_generation():
    model = llama()
    with attached(model):
        assert "forward" in model.lm_head.__dict__
        with attached(model):
            pass
        assert "forward" in model.lm_head.__dict__
    assert not any("forward" in module.__dict__ for module in model.modules())
