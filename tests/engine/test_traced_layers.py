"""Decoder layers as programs: they compute what the layers do, and what a program would not notice
keeps a layer as it is.
"""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import specache
from specache.engine import forward_pass
from specache.engine.traced import call_shape, recorder, traced_layers
from specache.engine.traced.layer_operations import Unrecordable
from specache.engine.traced.program import Program
from specache.kernels.types import AttentionParams
from specache.linear import cpu_linear
from specache.linear.weight_quant import WeightFormat, quantise_weights
from specache.platform import extension
from tests.engine.test_model_families import FAMILIES, build
from tests.tiny import llama, prompt, ragged

ISAS = extension.instruction_sets()
EVERYTHING = 10**6  # pairs: what is selected does not depend on rounding
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(not ISAS, reason=f"the C++ kernels are not built: {extension.IMPORT_ERROR}")


class Layer(nn.Module):
    """A layer of four query heads and two key-value heads of 8, with given code around them."""

    def __init__(self, before: Any = lambda x: x, after: Any = lambda x, attended: x + attended) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, hidden_states: Tensor, *more: Tensor, specache: Any, **kwargs: Any) -> Any:
        x = self.before(hidden_states, *more)
        batch, tokens, _ = x.shape
        query = x[..., :32].reshape(batch, tokens, 4, 8).transpose(1, 2)
        keys, values = (x[..., i : i + 16].reshape(batch, tokens, 2, 8).transpose(1, 2) * 1.0 for i in (0, 16))
        attended = forward_pass.attend(specache, 3, query * 1.0, keys, values, AttentionParams(0.5, None, None))
        return self.after(hidden_states, attended.reshape(batch, tokens, 32))


def attention(index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
    """An attention that mixes all it is given."""
    assert index == 3 and params.scaling == 0.5
    out = query.float() * 2 + (keys.float() - 0.25 * values.float()).repeat_interleave(2, dim=1)
    return out.transpose(1, 2).to(query.dtype).contiguous()


class Pass:
    attention = staticmethod(attention)


@torch.no_grad()
def check(layer: nn.Module, *inputs: Tensor, exact: bool = False, units: int = 1) -> None:
    """A program gives the layer's results, also for other numbers than it was recorded with."""
    changed = cpu_linear.install(layer)
    try:
        program = Program(layer, inputs, {"specache": None})
        for factor in (1.0, -3.0):
            others = tuple(each * factor + 0.125 for each in inputs)
            expected = layer(*others, specache=Pass())
            addresses = program.call.addresses(others, {"specache": None})
            assert addresses is not None
            out = program.run(addresses, attention)
            assert out.shape == expected.shape and out.stride() == expected.stride() and out.dtype is expected.dtype
            if exact:
                assert torch.equal(out, expected)
            else:
                unit = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[out.dtype]
                assert (out.float() - expected.float()).abs().amax() <= units * unit * expected.float().abs().amax()
    finally:
        cpu_linear.remove(changed)


ELEMENTWISE = {
    "add": lambda x: x + x,
    "subtract": lambda x: x - 0.5,
    "multiply": lambda x: x * x.mean(-1, keepdim=True),
    "divide": lambda x: x / (x * x + 1),
    "negate": lambda x: -x,
    "square": lambda x: x.pow(2),
    "clamp": lambda x: x.clamp(-0.5, 0.75),
    "clamp from below": lambda x: x.clamp(min=0.1),
    "relu": functional.relu,
    "float and back": lambda x: (x.float() * 1.1).to(x.dtype),
    "rotate": lambda x: torch.cat((-x[..., 16:], x[..., :16]), dim=-1) * 0.5,
    "stack": lambda x: torch.stack((x[..., ::2], -x[..., 1::2]), dim=-1).flatten(-2),
    "split": lambda x: torch.cat(x.chunk(4, dim=-1)[::-1], dim=-1),
    "transpose": lambda x: (x.unflatten(-1, (4, 8)).transpose(-1, -2) + 1).flatten(-2),
    "in place": lambda x: (x * 2).add_(x).mul_(0.5),
    "zeros": lambda x: x + torch.zeros_like(x),
}
FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu of tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": lambda x: torch.exp(x * 0.1),
    "root": lambda x: (x * x).sqrt(),
    "rms norm": lambda x: (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype),
    "layer norm": lambda x: functional.layer_norm(x, (32,)),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_operation_has_pytorchs_bits(name, dtype):
    torch.manual_seed(0)
    exact = name != "multiply"  # of a mean, whose order of addition differs
    check(Layer(ELEMENTWISE[name]), torch.randn(2, 3, 32, dtype=dtype), exact=exact)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_pytorchs_up_to_rounding(name, dtype):
    torch.manual_seed(0)
    check(Layer(FUNCTIONS[name], lambda x, attended: FUNCTIONS[name](attended) + x), torch.randn(2, 3, 32, dtype=dtype))


class Block(nn.Module):
    """Products, a norm with weights, a gate and a rotation by further inputs, of any size."""

    def __init__(self, size: int, wide: int, bias: bool) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(size), nn.Linear(size, 32, bias=bias)
        self.gate, self.down = nn.Linear(size, wide, bias=bias), nn.Linear(wide, size, bias=bias)
        self.out = nn.Linear(32, size, bias=bias)

    def forward(self, hidden_states: Tensor, cos: Tensor, *, specache: Any) -> Tensor:
        x = self.up(self.norm(hidden_states))
        query = x.unflatten(-1, (4, 8)).transpose(1, 2) * cos[:, None]
        keys, values = (query[:, i : i + 2] for i in (0, 2))
        attended = forward_pass.attend(specache, 3, query, keys, values, AttentionParams(0.5, None, None))
        x = hidden_states + self.out(attended.flatten(2))
        return x + self.down(functional.silu(self.gate(x)))


@pytest.mark.usefixtures("isa")
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 9).map(lambda n: 8 * n), st.integers(1, 50)),
    shape=st.sampled_from([(1, 1), (1, 2), (2, 2), (3, 1), (8, 1), (4, 2)]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_block_of_any_size_is_computed_as_by_its_own_code(sizes, shape, dtype, bias, seed):
    torch.manual_seed(seed)
    block = Block(*sizes, bias).to(dtype)
    check(block, torch.randn(*shape, sizes[0], dtype=dtype), torch.randn(shape[0], shape[1], 8, dtype=dtype), units=4)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [*ELEMENTWISE, *FUNCTIONS])
@torch.no_grad()
def test_what_is_not_finite_stays_so(name, value):
    function = {**ELEMENTWISE, **FUNCTIONS}[name]
    if (name, value) == ("gelu", float("inf")) or (name in ("gelu", "gelu of tanh", "silu") and value == -float("inf")):
        pytest.skip("NaN or not by the formula that is used")
    layer = Layer(function)
    x = torch.randn(1, 1, 32)
    program = Program(layer, (x,), {"specache": None})
    x[0, 0, 3] = value
    expected = layer(x, specache=Pass())
    addresses = program.call.addresses((x,), {"specache": None})
    out = program.run(addresses, attention)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())


UNRECORDABLE = {
    "a sum over other dimensions": lambda x: x - x.mean(1, keepdim=True),
    "a choice by value": lambda x: x if x.sum() > 0 else -x,
    "another operation": lambda x: x.cumsum(-1),
    "numbers of its own": lambda x: x + torch.arange(32, dtype=x.dtype),
    "whole numbers": lambda x: x.long().to(x.dtype),
    "its input changed": lambda x: x.add_(1.0),
    "double": lambda x: x.double().to(x.dtype),
    "random numbers": lambda x: functional.dropout(x, 0.5, training=True),
}


@pytest.mark.parametrize("name", UNRECORDABLE)
@torch.no_grad()
def test_what_a_program_cannot_do_is_not_recorded(name):
    with pytest.raises(Unrecordable):
        Program(Layer(UNRECORDABLE[name]), (torch.randn(1, 2, 32),), {"specache": None})


@torch.no_grad()
def test_a_call_of_another_kind_is_not_the_programs():
    x = torch.randn(1, 2, 32)
    program = Program(Layer(), (x,), {"specache": None, "use_cache": False})
    assert program.call.addresses((x,), {"specache": Pass(), "use_cache": False}) is not None
    for args, kwargs in [
        ((x,), {"specache": None, "use_cache": True}),
        ((x,), {"specache": None, "use_cache": 0}),
        ((x,), {"specache": None}),
        ((x, x), {"specache": None, "use_cache": False}),
        ((x.bfloat16(),), {"specache": None, "use_cache": False}),
        ((x[:, :1],), {"specache": None, "use_cache": False}),
        ((torch.randn(1, 32, 2).transpose(1, 2),), {"specache": None, "use_cache": False}),
    ]:
        assert program.call.addresses(args, kwargs) is None


class TwoInputs(Layer):
    def forward(self, hidden_states: Tensor, own: Tensor, *, specache: Any) -> Any:
        return super().forward(hidden_states + own, specache=specache)


@torch.no_grad()
def test_an_argument_of_each_layer_is_not_taken_for_that_of_the_layer_before():
    layer, x = TwoInputs(), torch.randn(1, 1, 32)
    program = Program(layer, (x, x.clone()), {"specache": None})
    with call_shape.step():
        for factor in range(20):  # each argument is dropped after its call, so that the next may get its place
            own = torch.full((1, 1, 32), float(factor))
            expected = layer(x, own, specache=Pass())
            addresses = program.call.addresses((x, own), {"specache": None})
            del own
            torch.full((1, 1, 32), -1e6)
            assert torch.equal(program.run(addresses, attention), expected)
    assert not call_shape._step.others


@torch.no_grad()
def test_a_program_whose_results_differ_is_not_used(monkeypatch):
    translate = recorder.translate

    def wrong(name: str, *args: Any) -> Any:
        return translate("aten.sub.Tensor" if name == "aten.add.Tensor" else name, *args)

    monkeypatch.setattr(recorder, "translate", wrong)
    with pytest.raises(Unrecordable, match="its results differ"):
        Program(Layer(), (torch.randn(1, 2, 32),), {"specache": None})


class Numbered(Layer):
    """A layer whose code depends on its number."""

    def __init__(self, number: int, factors: tuple[float, ...], before: Any) -> None:
        super().__init__(before, lambda x, attended: x + attended * factors[number])
        self.linear = nn.Linear(32, 32)


@torch.no_grad()
def test_a_recording_serves_another_layer_only_if_it_computes_the_same():
    inputs = (torch.randn(1, 2, 32),)
    first, same, other = (Numbered(i, (1.0, 1.0, 1.5), lambda x: x * 1.0) for i in range(3))
    program = Program(first, inputs, {"specache": None})
    assert Program(same, inputs, {"specache": None}, like=program)._program is program._program
    with pytest.raises(Unrecordable, match="its results differ"):
        Program(other, inputs, {"specache": None}, like=program)
    same.linear = nn.Linear(32, 16)
    with pytest.raises(Unrecordable, match="another structure"):
        Program(same, inputs, {"specache": None}, like=program)


def programs_of(model: Any) -> list[Any]:
    answer(model)
    found = traced_layers.layers_of(model)._programs
    return [found[key]._program for key in sorted(found, key=lambda key: (key[1], key[0]))]


def test_equal_layers_share_one_recording():
    model = llama(num_hidden_layers=4)
    assert len({id(each) for each in programs_of(model)}) == 1
    model.model.layers[2].input_layernorm.variance_epsilon *= 1.001
    model.model.layers[3].mlp.act_fn = nn.GELU().eval()
    assert [len({id(each) for each in programs_of(model)[:n]}) for n in (2, 3, 4)] == [1, 2, 3]
    assert_as_eager(model)


# Answers of models


def answer(model: Any, *lengths: int, text: Any = None, **changes: Any) -> Any:
    ids, mask = ragged(*(lengths or (113,))) if text is None else text
    given = {"policy": "on-demand", "slow_tier": "ram-inplace", "residual": 16, "group_size": 16, "top_k": EVERYTHING, **changes}
    cache = specache.SpeCache(model, specache.SpeCacheConfig(**given))
    arguments = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = specache.generate(model, ids, attention_mask=mask, past_key_values=cache, **arguments)
    return out.sequences, torch.stack(out.logits), cache.stats()


def eager(model: Any, *lengths: int, **changes: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traced_layers, "begin_answer", lambda model: None)
        return answer(model, *lengths, **changes)


def assert_as_eager(model: Any, *lengths: int, traced: bool = True, **changes: Any) -> None:
    expected, ours = eager(model, *lengths, **changes), answer(model, *lengths, **changes)
    assert torch.equal(ours[0], expected[0])
    assert (ours[1] - expected[1]).abs().amax() < 1e-3
    assert expected[2]["traced_steps"] == 0 and ours[2]["traced_steps"] == (ours[2]["decode_steps"] if traced else 0)


@pytest.mark.parametrize("policy", ["on-demand", "verified", "speculative", "previous"])
@pytest.mark.parametrize("lengths", [(113,), (60, 113, 90)])
def test_answers_are_those_of_eager_layers(policy, lengths):
    assert_as_eager(llama(num_hidden_layers=3), *lengths, policy=policy, slow_tier="ram")


@pytest.mark.usefixtures("torch_kernels")
@pytest.mark.parametrize("policy", ["on-demand", "verified", "speculative", "previous", "none"])
@pytest.mark.parametrize("lengths", [(113,), (60, 113, 90)])
def test_answers_are_those_of_eager_layers_where_nothing_is_rounded(policy, lengths):
    """The C++ kernels round queries to 8 bits, and the layers' last bits may turn one of them."""
    assert_as_eager(llama(num_hidden_layers=3), *lengths, policy=policy, slow_tier="ram")


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_other_families_are_those_of_eager_layers(family):
    model = build(*FAMILIES[family])
    expected, ours = eager(model), answer(model)
    assert torch.equal(ours[0], expected[0]) and (ours[1] - expected[1]).abs().amax() < 1e-3


@pytest.mark.parametrize("weights", [WeightFormat.INT8, WeightFormat.INT4])
def test_packed_weights_run_in_programs(weights):
    model = llama(num_hidden_layers=2)
    quantise_weights(model, weights)
    assert_as_eager(model)


def test_the_yardstick_stays_eager():
    assert_as_eager(llama(), policy="full", traced=False)


def test_a_batch_of_more_rows_than_products_take_is_eager():
    model = llama(num_hidden_layers=2)
    lengths = (40,) * (cpu_linear.MOST_FEW_ROWS + 1)
    expected, ours = eager(model, *lengths), answer(model, *lengths)
    assert torch.equal(ours[0], expected[0]) and ours[2]["traced_steps"] == 0
    alone = answer(model, 40)  # whose steps have programs: those of the batch still have not
    assert alone[2]["traced_steps"] > 0 and answer(model, *lengths)[2]["traced_steps"] == 0


def test_a_sequence_has_the_same_bits_alone_and_beside_others():
    model = llama(num_hidden_layers=2)
    ids, mask = ragged(60, 113, 90)
    together, alone = answer(model, text=(ids, mask)), answer(model, text=(ids[1:2], mask[1:2]))
    assert torch.equal(together[1][:, 1], alone[1][:, 0])


def submodule(model: Any) -> nn.Module:
    return model.model.layers[1].mlp


def test_hooks_of_the_user_are_called():
    model, called = llama(num_hidden_layers=3), []
    answer(model)
    handle = submodule(model).register_forward_hook(lambda *_: called.append(1))
    assert_as_eager(model)
    assert len(called) >= 2 * 12  # every step, and the prompts
    handle.remove()
    assert_as_eager(model)


def test_a_hook_that_changes_results_does_so():
    model = llama(num_hidden_layers=3)
    before = answer(model)
    submodule(model).register_forward_hook(lambda module, args, out: out * 0.5)
    after = answer(model)
    assert not torch.equal(after[1], before[1])
    assert_as_eager(model)


def up(model: Any) -> Any:
    return submodule(model).up_proj


CHANGES = {
    "weights in place": lambda model: up(model).weight.data.mul_(1.5),
    "weights replaced": lambda model: setattr(up(model), "weight", nn.Parameter(up(model).weight * 1.5)),
    "weights' memory replaced": lambda model: setattr(up(model).weight, "data", up(model).weight.data * 1.5),
    "a module replaced": lambda model: setattr(submodule(model), "up_proj", copy.deepcopy(model.model.layers[0].mlp.up_proj)),
    "an activation replaced": lambda model: setattr(submodule(model), "act_fn", nn.GELU()),
    "a setting": lambda model: setattr(model.model.layers[1].input_layernorm, "variance_epsilon", 0.5),
    "a forward": lambda model: setattr(submodule(model), "forward", lambda x: x),
    "a layer replaced": lambda model: model.model.layers.__setitem__(1, copy.deepcopy(model.model.layers[0])),
    "quantised": lambda model: quantise_weights(model, WeightFormat.INT8),
    "another dtype": lambda model: model.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_model_answers_as_it_is_now(change):
    model = llama(num_hidden_layers=3)
    before = answer(model)
    CHANGES[change](model)
    if change == "a layer replaced":
        model.model.layers[1].self_attn.layer_idx = 1
    expected, ours = eager(model), answer(model)
    assert torch.equal(ours[0], expected[0]) and (ours[1] - expected[1]).abs().amax() < 1e-3
    assert not torch.equal(ours[1], before[1])


def test_a_copy_of_a_model_has_programs_of_its_own():
    model = llama(num_hidden_layers=2)
    before = answer(model)
    twin = copy.deepcopy(model)
    submodule(twin).up_proj.weight.data.mul_(1.5)
    assert_as_eager(twin)
    assert torch.equal(answer(model)[1], before[1])


def test_training_mode_and_autocast_stay_eager():
    model = llama(num_hidden_layers=2)
    answer(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert answer(model)[2]["traced_steps"] == 0
    assert answer(model)[2]["traced_steps"] > 0
    model.train()
    assert answer(model)[2]["traced_steps"] == 0


def test_a_changed_configuration_is_recorded_again():
    model = llama(num_hidden_layers=2)
    answer(model)
    before = dict(traced_layers.layers_of(model)._programs)
    answer(model)
    assert traced_layers.layers_of(model)._programs == before
    model.config.initializer_range = 0.5
    answer(model)
    after = traced_layers.layers_of(model)._programs
    assert after.keys() == before.keys() and not set(after.values()) & set(before.values())


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.25


def test_modules_of_other_packages_stay_eager():
    model = llama(num_hidden_layers=3)
    old = up(model)
    new = Scaled(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    submodule(model).up_proj = new
    assert_as_eager(model)


def test_a_layers_forward_that_was_replaced_stays():
    model = llama(num_hidden_layers=3)
    layer = model.model.layers[1]
    layer.forward = lambda hidden_states, *args, **kwargs: type(layer).forward(layer, hidden_states * 1.1, *args, **kwargs)
    assert_as_eager(model)


def test_programs_keep_no_model_and_no_weights_alive():
    model = llama(num_hidden_layers=2)
    answer(model)
    gone = (weakref.ref(model), *(weakref.ref(weight) for weight in model.parameters()))
    gc.disable()
    try:
        del model
        alive = [ref for ref in gone if ref() is not None]
    finally:
        gc.enable()
    gc.collect()
    assert not [ref for ref in gone if ref() is not None], len(alive)


def test_a_forward_that_was_put_on_a_model_does_not_keep_it_alive():
    """As accelerate does: it refers to the model."""
    model = llama(num_hidden_layers=2)
    model.forward = functools.partial(type(model).forward, model)
    assert answer(model)[2]["traced_steps"] > 0
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_threads_record_and_run_one_model_at_once():
    model, results, errors = llama(num_hidden_layers=3), {}, []
    expected = {length: eager(model, length) for length in (40, 70, 113)}

    def run(length: int, index: int) -> None:
        try:
            results[length, index] = answer(model, length)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(length, index)) for length in expected for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(found[0], expected[length][0]) for (length, _), found in results.items())


def test_a_conversation_goes_on_with_programs():
    model = llama(num_hidden_layers=2)
    config = specache.SpeCacheConfig(slow_tier="ram", residual=16, group_size=16, top_k=10**6)
    cache = specache.SpeCache(model, config)
    text = prompt(90)
    for _ in range(3):
        text = specache.generate(model, text, past_key_values=cache, max_new_tokens=5, do_sample=False)
        text = torch.cat([text, prompt(7)], dim=1)
    expected = model.generate(text, max_new_tokens=5, do_sample=False)
    assert torch.equal(specache.generate(model, text, past_key_values=cache, max_new_tokens=5, do_sample=False), expected)
    assert cache.stats()["traced_steps"] == cache.stats()["decode_steps"]
