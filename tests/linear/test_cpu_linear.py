"""Linear layers the fast way: the same products, only while a model is ours to run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specache.engine.attention_hook import attached
from specache.linear import cpu_linear as products
from specache.model.dimensions import dimensions_of
from tests.tiny import llama

HALVES = (torch.bfloat16, torch.float16)
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch was built without MKL")


@pytest.fixture
def no_native_halves(monkeypatch):
    """A processor without instructions for 16-bit products, whatever this one has."""
    monkeypatch.setattr(products, "multiplies_natively", lambda dtype: False)


@needs_mkl
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 2, 48), (4, 2, 48), (3, 3, 48), (0, 48), (48,)])
def test_products_are_those_of_the_ordinary_layer(bias, shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80, bias=bias), torch.randn(shape)
    expected = layer(x)
    layers = products.install(nn.Sequential(layer))
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == expected.shape and layer(x).is_contiguous()
    products.remove(layers)
    assert torch.equal(layer(x), expected)


@needs_mkl
def test_a_row_gives_the_same_numbers_alone_and_beside_another():
    torch.manual_seed(0)
    layer, x = nn.Linear(576, 192, bias=False), torch.randn(1, 2, 576)
    products.install(nn.Sequential(layer))
    torch.testing.assert_close(layer(x[:, :1]), layer(x)[:, :1], rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.usefixtures("no_native_halves")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, products.FEWEST_MANY_ROWS, 3 * products.FEWEST_MANY_ROWS])
def test_sixteen_bit_products_are_those_of_float32_rounded_once(dtype, bias, rows):
    torch.manual_seed(0)
    outputs = products.BLOCK_ELEMENTS // 1024 * 5 // 2  # three blocks, the last a part of one
    layer, x = nn.Linear(1024, outputs, bias=bias).to(dtype), torch.randn(1, rows, 1024).to(dtype)
    exact = nn.functional.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
    layers = products.install(nn.Sequential(layer))
    out = layer(x)
    assert out.dtype is dtype and out.is_contiguous()
    torch.testing.assert_close(out, exact.to(dtype))
    products.remove(layers)
    assert layers == [layer] and "forward" not in layer.__dict__


@pytest.mark.usefixtures("no_native_halves")
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_go_through_the_ordinary_layer(dtype):
    layer, x = nn.Linear(48, 80).to(dtype), torch.randn(64, 48).to(dtype).requires_grad_()
    products.install(nn.Sequential(layer))
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


def test_sixteen_bits_stay_where_the_processor_multiplies_them(monkeypatch):
    monkeypatch.setattr(products, "multiplies_natively", lambda dtype: True)
    assert products.install(nn.Sequential(*[nn.Linear(8, 8).to(dtype) for dtype in HALVES])) == []


@pytest.mark.usefixtures("no_native_halves")
def test_only_plain_layers_with_an_original_forward_are_replaced():
    double, hooked, derived = nn.Linear(8, 8).double(), nn.Linear(8, 8), type("Other", (nn.Linear,), {})(8, 8)
    hooked.forward = hooked.forward  # as accelerate's hooks do
    assert products.install(nn.ModuleList([double, hooked, derived])) == []
    assert "forward" in hooked.__dict__


@needs_mkl
def test_a_model_is_itself_again_after_generation():
    model = llama()
    with attached(model):
        assert "forward" in model.lm_head.__dict__
        with attached(model):
            pass
        assert "forward" in model.lm_head.__dict__
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_plan_counts_blocks_only_for_the_type_that_needs_them(monkeypatch):
    """As on processors with instructions for bfloat16 alone."""
    monkeypatch.setattr(products, "multiplies_natively", lambda dtype: dtype is torch.bfloat16)
    for dtype, widens in ((torch.bfloat16, False), (torch.float16, True), (torch.float32, False)):
        model = llama(num_hidden_layers=1).to(dtype)
        assert dimensions_of(model).widens == widens
        assert not dimensions_of(model, device="cuda").widens
