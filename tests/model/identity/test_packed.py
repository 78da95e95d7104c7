"""Weights that are no plain tensors: quantised by PyTorch, tensor subclasses, bitsandbytes,
torchao.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import specache
from specache.linear.cpu_linear import install
from specache.model.dimensions import dimensions_of
from specache.sessions.identity import identify
from tests.model.identity.two_turns import NEW, first_turn, settings
from tests.tiny import llama, prompt

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def plain(seed: int = 0) -> Any:
    """Return a model whose sizes bitsandbytes' blocks of 64 divide."""
    return llama(seed=seed, intermediate_size=128)


class Int8Weight(Tensor):
    """int8 codes with a scale per row, as a tensor subclass (torchao's are such)."""

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Int8Weight:
        return Int8Weight(inner["codes"], inner["scales"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Int8Weight(args[0].codes, args[0].scales)
        if func is torch.ops.aten.take.default:
            raise NotImplementedError("as torchao's")
        wide = tree_map(lambda x: x.codes.to(x.scales.dtype) * x.scales if isinstance(x, Int8Weight) else x, (args, kwargs or {}))
        return func(*wide[0], **wide[1])


def with_subclasses(seed: int = 0) -> Any:
    model = plain(seed)
    for module in model.modules():
        if type(module) is nn.Linear:
            scales = module.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (module.weight.detach() / scales).round().to(torch.int8)
            module.weight = nn.Parameter(Int8Weight(codes, scales), requires_grad=False)
    return model


def dynamic(seed: int = 0) -> Any:
    return torch.ao.quantization.quantize_dynamic(plain(seed), {nn.Linear}, dtype=torch.qint8)


def bitsandbytes(bits: int, seed: int) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    model = plain(seed)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, own = name.rpartition(".")
            sizes = (module.in_features, module.out_features)
            if bits == 4:
                packed = bnb.nn.Linear4bit(*sizes, bias=False)
                packed.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, module=packed)
            else:
                packed = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                packed.weight = bnb.nn.Int8Params(module.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
            setattr(model.get_submodule(parent), own, packed.to("cpu"))
    return model


def torchao(seed: int = 0) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    model = plain(seed)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


KINDS = {
    "tensor subclass": with_subclasses,
    "quantize_dynamic": dynamic,
    "bitsandbytes 4": lambda seed=0: bitsandbytes(4, seed),
    "bitsandbytes 8": lambda seed=0: bitsandbytes(8, seed),
    "torchao": torchao,
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@kinds
def test_a_packed_model_has_the_dimensions_of_its_matrices(make):
    assert dimensions_of(make()).layers == dimensions_of(plain()).layers


@kinds
def test_a_packed_model_answers_as_stock_does(make):
    model = make()
    answer = specache.generate(model, prompt(150), config=settings(policy="verified"), max_new_tokens=12, do_sample=False)
    assert torch.equal(answer, make().generate(prompt(150), max_new_tokens=12, do_sample=False))


@kinds
def test_a_cache_refuses_other_packed_weights(make):
    model = make()
    cache, said = first_turn(model)
    ids = torch.cat([said, prompt(5, seed=1)], dim=1)
    specache.generate(model, ids, past_key_values=cache, **NEW)
    specache.generate(make(), ids, past_key_values=cache, **NEW)
    with pytest.raises(specache.UsageError, match="another model"):
        specache.generate(make(1), ids, past_key_values=cache, **NEW)


@kinds
def test_a_session_opens_again_and_not_for_other_weights(make, tmp_path):
    model = make()
    for each in (model, model, make()):
        with specache.Session("s", each, settings(slow_tier="auto"), folder=tmp_path) as session:
            specache.generate(each, prompt(70), past_key_values=session.cache, **NEW)
            session.save()
    for other in (make(1), plain()):
        with pytest.raises(specache.SessionError, match="other weights, or with weights in another format"):
            specache.Session("s", other, folder=tmp_path)


def test_packed_weights_that_differ_only_in_scales_are_told_apart():
    scaled = with_subclasses()
    scaled.model.layers[0].mlp.up_proj.weight.scales.mul_(1.5)
    assert identify(scaled).weights != identify(with_subclasses()).weights


@kinds
def test_fast_products_leave_packed_layers_alone(make):
    changed = install(make())
    assert all(type(layer) is nn.Linear and type(layer.weight) is nn.Parameter for layer in changed)


def test_a_4_bit_weight_keeps_its_identity_when_repacked_for_the_cpu():
    """As on processors with bfloat16 instructions, where a layer packs its weight when it first
    runs.
    """
    bnb = pytest.importorskip("bitsandbytes")
    model, packed = bitsandbytes(4, 0), bitsandbytes(4, 0)
    for module in packed.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            data, state = bnb.functional._convert_weight_packed_for_cpu(module.weight.data, module.weight.quant_state)
            module.weight.data, module.weight.quant_state = data, state
    assert identify(packed) == identify(model) != identify(bitsandbytes(4, 1))
