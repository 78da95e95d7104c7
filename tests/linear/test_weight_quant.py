"""Weights at 8 and 4 bits: close to the float ones, fewer bytes, in every layer whose size fits,
the tied head included.
"""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import specache
from specache.errors import ConfigError, UnsupportedModelError
from specache.linear import native_products, packed_weights
from specache.linear.weight_quant import Int4Linear, Int8Linear, WeightFormat, quantise_weights
from specache.platform import private_torch
from tests.engine.test_model_families import FAMILIES, build
from tests.tiny import llama, prompt

BOUNDS = {Int8Linear: 0.012, Int4Linear: 0.1}  # relative error of outputs, of normally distributed weights
FORMATS = {WeightFormat.INT8: Int8Linear, WeightFormat.INT4: Int4Linear}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("made", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 5, 47, 48, 400])
def test_a_quantised_layer_is_close_to_the_float_one(made, dtype, rows):
    torch.manual_seed(rows)
    weight, bias = torch.randn(192, 96, dtype=dtype), torch.randn(192, dtype=dtype)
    x = torch.randn(3, rows, 96, dtype=dtype)[:1]
    out = made(weight, bias)(x)
    assert out.shape == (1, rows, 192) and out.dtype == dtype
    assert distance(out, linear(x.float(), weight.float(), bias.float())) < BOUNDS[made]


@pytest.mark.parametrize("made", BOUNDS)
@pytest.mark.parametrize("outputs", [16, 32, 48, 64, 128, 208])
def test_few_rows_and_many_give_the_same(made, outputs):
    torch.manual_seed(outputs)
    layer, x = made(torch.randn(outputs, 64), None), torch.randn(7, 64)
    assert torch.equal(layer(x.repeat(100, 1))[:7], layer(x))


def test_a_prompt_is_multiplied_in_16_bits_where_that_is_faster(monkeypatch):
    """On a processor with matrix registers: the rows are not rounded."""
    layer, x = Int8Linear(torch.randn(40, 64), None), torch.randn(native_products.MANY_ROWS, 64).bfloat16()
    monkeypatch.setattr(private_torch, "has_matrix_registers", lambda: True)
    matrix = packed_weights.unpack(packed_weights.PackedWeights(layer.codes, layer.scales, None, 40), torch.bfloat16)[:40]
    assert torch.equal(layer(x), linear(x, matrix))
    assert not torch.equal(layer(x[:-1]), layer(x)[:-1])


@pytest.mark.parametrize("made", BOUNDS)
def test_a_layer_is_copied_saved_and_moved_between_dtypes(made, tmp_path):
    layer, x = made(torch.randn(40, 64), torch.randn(40)), torch.randn(3, 64)
    expected = layer(x)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = made(torch.zeros(40, 64), torch.zeros(40))
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    for same in (copy.deepcopy(layer), other, layer.to(torch.bfloat16).float()):
        assert distance(same(x), expected) < 0.01
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("made", BOUNDS)
@pytest.mark.parametrize("rows", [1, 100])
def test_rows_of_another_length_are_refused(made, rows):
    layer = made(torch.randn(40, 64), None)
    for inputs in (32, 96):
        with pytest.raises(RuntimeError, match=f"64 inputs was called with {inputs}"):
            layer(torch.randn(rows, inputs))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_float_weights_are_freed_layer_by_layer(monkeypatch, weights, tied):
    model = llama(vocab_size=96, tie_word_embeddings=tied)
    alive = [weakref.ref(layer.weight) for layer in model.modules() if type(layer) is nn.Linear and layer is not model.lm_head]
    seen, pack = [], packed_weights.pack

    def counted(weight, bits, arena):
        seen.append(sum(reference() is not None for reference in alive))
        return pack(weight, bits, arena)

    monkeypatch.setattr(packed_weights, "pack", counted)
    quantise_weights(model, weights)
    assert seen == [*range(len(alive), 0, -1), 0]


@pytest.mark.parametrize("made", BOUNDS)
def test_rows_of_zeros_and_equal_values_survive(made):
    weight = torch.zeros(16, 32)
    weight[1] = 3.0
    out = made(weight, None)(torch.ones(1, 32))[0]
    assert out.isfinite().all() and out[0] == 0 and out[1] == pytest.approx(96, rel=0.01)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_all_layers_are_quantised_and_the_embedding_stays(weights, tied):
    model = llama(vocab_size=96, tie_word_embeddings=tied)
    embedding = model.get_input_embeddings().weight.clone()
    quantise_weights(model, weights)
    assert not [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert isinstance(model.lm_head, FORMATS[weights])
    assert torch.equal(model.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("weights", FORMATS)
def test_generation_over_quantised_weights_is_that_of_the_stock_model_over_them(weights):
    model = llama(vocab_size=96)
    quantise_weights(model, weights)
    ids = prompt(80).clamp(max=95)
    ours = specache.generate(model, ids, config=specache.SpeCacheConfig(policy="full"), max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, model.generate(ids, max_new_tokens=8, do_sample=False))


def test_layers_of_other_sizes_stay_and_formats_of_the_model_change_nothing():
    model = llama(intermediate_size=100)  # no multiple of 32
    quantise_weights(model, WeightFormat.INT4)
    mlp = model.model.layers[0].mlp
    assert type(mlp.down_proj) is nn.Linear and isinstance(mlp.up_proj, Int4Linear) and isinstance(model.lm_head, Int4Linear)
    for weights in (WeightFormat.AUTO, WeightFormat.BF16):
        quantise_weights(unchanged := llama(), weights)
        assert type(unchanged.model.layers[0].mlp.up_proj) is nn.Linear


def test_what_cannot_be_quantised_says_why():
    experts = build("Qwen3Moe", {**FAMILIES["qwen3-moe"][1], "moe_intermediate_size": 96})
    with pytest.raises(UnsupportedModelError, match="outside linear layers"):
        quantise_weights(experts, WeightFormat.INT8)
    with pytest.raises(ConfigError, match="for the CPU"):
        quantise_weights(llama().to("meta"), WeightFormat.INT4)


@pytest.mark.parametrize("weights", FORMATS)
def test_packed_layers_can_be_copied_moved_and_saved(weights, tmp_path):
    """They lie behind one another in memory, which must not show."""
    model = llama(vocab_size=96)
    quantise_weights(model, weights)
    ids = prompt(40).clamp(max=95)
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    torch.save(model.state_dict(), tmp_path / "weights")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.codes.zero_()
    assert torch.equal(twin(ids).logits, expected) and not torch.equal(model(ids).logits, expected)
    model.load_state_dict(torch.load(tmp_path / "weights"))
    assert torch.equal(model(ids).logits, expected)
    assert (tmp_path / "weights").stat().st_size < 2 * sum(each.nbytes for each in model.state_dict().values())
