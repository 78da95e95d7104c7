"""Linear layers the fast way: the same products, only while a model is ours to run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specache.engine.attention_hook import attached
from specache.linear import cpu_linear as products
from specache.model.dimensions import dimensions_of
from specache.platform import extension
from tests.tiny import llama

HALVES = (torch.bfloat16, torch.float16)
needs_extension = pytest.mark.skipif(not extension.instruction_sets(), reason="the C++ kernels are not built")


@pytest.fixture
def no_native_halves(monkeypatch):
    """A processor without instructions for 16-bit products, whatever this one has."""
    monkeypatch.setattr(products, "multiplies_natively", lambda dtype: False)


@torch.no_grad()
@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 2, 48), (4, 2, 48), (3, 3, 48), (0, 48), (48,)])
def test_products_are_those_of_the_ordinary_layer(dtype, bias, shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 80, bias=bias).to(dtype), torch.randn(shape).to(dtype)
    expected = layer(x)
    layers = products.install(nn.Sequential(layer))
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == expected.shape and layer(x).is_contiguous()
    products.remove(layers)
    assert torch.equal(layer(x), expected)


@torch.no_grad()
@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_row_has_the_same_bits_alone_and_beside_others(dtype):
    torch.manual_seed(0)
    layer, x = nn.Linear(576, 192, bias=False).to(dtype), torch.randn(1, 8, 576).to(dtype)
    products.install(nn.Sequential(layer))
    for count in range(1, 9):
        assert torch.equal(layer(x[:, :count]), layer(x)[:, :count])


@torch.no_grad()
@pytest.mark.usefixtures("no_native_halves")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, products.MOST_FEW_ROWS + 1, 4 * products.MOST_FEW_ROWS])
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


@torch.no_grad()
@pytest.mark.usefixtures("no_native_halves")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows", [1, 40])
def test_what_the_ordinary_layer_refuses_is_refused(dtype, rows):
    layer = nn.Linear(48, 80).to(dtype)
    products.install(nn.Sequential(layer))
    for inputs in (24, 96):
        with pytest.raises(RuntimeError):
            layer(torch.randn(rows, inputs).to(dtype))


@torch.no_grad()
def test_weights_that_are_replaced_meanwhile_are_read_as_they_lie():
    layer, x = nn.Linear(48, 80), torch.randn(2, 48)
    products.install(nn.Sequential(layer))
    layer.weight.data = torch.randn(48, 80).T  # inputs of an output no longer side by side
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.usefixtures("no_native_halves")
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_go_through_the_ordinary_layer(dtype):
    layer, x = nn.Linear(48, 80).to(dtype), torch.randn(64, 48).to(dtype).requires_grad_()
    products.install(nn.Sequential(layer))
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


def test_many_rows_of_16_bits_stay_where_the_processor_multiplies_them(monkeypatch):
    monkeypatch.setattr(products, "multiplies_natively", lambda dtype: True)
    monkeypatch.setattr(products, "_widened", None)
    with torch.no_grad():
        for dtype in HALVES:
            layer, x = nn.Linear(8, 8).to(dtype), torch.randn(40, 8).to(dtype)
            expected = layer(x)
            products.install(nn.Sequential(layer))
            assert torch.equal(layer(x), expected)


@pytest.mark.usefixtures("no_native_halves")
def test_only_plain_layers_with_an_original_forward_are_replaced():
    double, hooked, derived = nn.Linear(8, 8).double(), nn.Linear(8, 8), type("Other", (nn.Linear,), {})(8, 8)
    hooked.forward = hooked.forward  # as accelerate's hooks do
    assert products.install(nn.ModuleList([double, hooked, derived])) == []
    assert "forward" in hooked.__dict__


@needs_extension
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
