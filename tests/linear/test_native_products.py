"""The extension's products with weights: those of the matrices that the weights stand for, on every
instruction set, with a row's bits independent of the rows beside it.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from specache.linear import native_products as products
from specache.linear import packed_weights
from specache.platform import extension

ISAS = extension.instruction_sets()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of one result
pytestmark = pytest.mark.skipif(not ISAS, reason=f"the C++ kernels are not built: {extension.IMPORT_ERROR}")


def exact_rows(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that rounding leaves as they are: in each block whole numbers up to 127, which occurs,
    times a power of two.
    """
    x = torch.randint(-127, 128, (rows, inputs // packed_weights.BLOCK, packed_weights.BLOCK)).float()
    x[..., 5] = 127.0
    return (x * 2.0 ** torch.randint(-8, 1, (*x.shape[:2], 1))).flatten(1).to(dtype)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 33, 600])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_is_that_of_the_matrix_that_the_codes_stand_for(bits, dtype, rows, bias):
    torch.manual_seed(rows)
    outputs, inputs = 83, 96  # the last tile is a part of one
    weights = packed_weights.pack(torch.randn(outputs, inputs, dtype=dtype), bits)
    x, b = exact_rows(rows, inputs, dtype), torch.randn(outputs, dtype=dtype) if bias else None
    expected = linear(x.double(), packed_weights.unpack(weights, torch.float64)[:outputs])
    out = products.packed_linear(x, weights, b)
    assert out.shape == (rows, outputs) and out.dtype is dtype and out.is_contiguous()
    assert distance(out, expected if b is None else expected + b.double()) < 2 * ROUNDING[dtype]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48, 80), (2, 50, 83), (3, 1, 1), (8, 576, 17), (5, 2048, 35)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_with_float_weights_is_summed_in_float32(dtype, shape, bias):
    rows, inputs, outputs = shape
    torch.manual_seed(inputs)
    weight = torch.randn(outputs, inputs + 5, dtype=dtype)[:, :inputs]  # rows of a larger matrix
    x, b = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, dtype=dtype) if bias else None
    expected = linear(x.double(), weight.double(), None if b is None else b.double())
    assert distance(products.plain_linear(x, weight, b), expected) < ROUNDING[dtype]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", ["8", "4", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_beside_others(kind, dtype):
    torch.manual_seed(0)
    weight = torch.randn(70, 192, dtype=dtype)
    x = torch.randn(products.MANY_ROWS - 4, 192, dtype=dtype)  # more are PyTorch's with AMX
    packed = None if kind == "plain" else packed_weights.pack(weight, int(kind))

    def product(rows: torch.Tensor) -> torch.Tensor:
        return products.plain_linear(rows, weight, None) if packed is None else products.packed_linear(rows, packed, None)

    alone = torch.cat([product(x[i : i + 1]) for i in range(len(x))])
    for count in (2, 3, 4, 5, 6, 7, 8, *([] if packed is None else [len(x)])):
        assert torch.equal(product(x[:count]), alone[:count])
        assert torch.equal(product(x[-count:]), alone[-count:])


@pytest.mark.usefixtures("isa")
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    outputs=st.integers(1, 70),
    blocks=st.integers(1, 9),
    bits=st.sampled_from([8, 4]),
    threads=st.integers(1, 5),
    exponent=st.integers(-12, 12),
)
def test_products_of_any_size_and_magnitude(rows, outputs, blocks, bits, threads, exponent):
    torch.manual_seed(rows * outputs)
    inputs, before = blocks * packed_weights.BLOCK, torch.get_num_threads()
    weights = packed_weights.pack(torch.randn(outputs, inputs) * 10.0**exponent, bits)
    x = exact_rows(rows, inputs, torch.float32) * 2.0 ** (3 * exponent)
    torch.set_num_threads(threads)
    try:
        out = products.packed_linear(x, weights, None)
    finally:
        torch.set_num_threads(before)
    matrix = packed_weights.unpack(weights, torch.float64)[:outputs]
    # of sums that cancel, the error is as large as that of their terms
    error = (out.double() - linear(x.double(), matrix)).abs()
    assert out.shape == error.shape and bool((error <= 2e-6 * linear(x.double().abs(), matrix.abs())).all())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rounded_to_the_nearest_of_255_steps_of_their_block(dtype):
    """Seen through a matrix that is 127 times the identity, which 8 bits hold exactly."""
    torch.manual_seed(4)
    weights = packed_weights.pack(127.0 * torch.eye(96), 8)
    x = (torch.randn(40, 96) * torch.logspace(-6, 3, 40).unsqueeze(1)).to(dtype)
    found = products.packed_linear(x.float(), weights, None) / 127
    step = x.float().unflatten(1, (3, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1) / 127
    assert bool(((found - x.float()).abs() <= 0.50001 * step).all())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bits, bad):
    weight = torch.randn(20, 64)
    weights, x = packed_weights.pack(weight, bits), torch.randn(3, 64)
    x[1, 40] = bad
    out = products.packed_linear(x, weights, None)
    assert out[[0, 2]].isfinite().all() and not out[1].isfinite().any()
    weight[7, 3] = bad
    broken = products.packed_linear(torch.ones(1, 64), packed_weights.pack(weight, bits), None)[0]
    assert not broken[7].isfinite() and broken[:7].isfinite().all() and broken[8:].isfinite().all()
    assert not products.plain_linear(x, weight, None)[1].isfinite().any()


@pytest.mark.usefixtures("isa")
def test_results_too_large_for_half_precision_are_infinite_and_small_ones_are_kept():
    weight, x = torch.full((1, 32), 256.0, dtype=torch.float16), torch.full((1, 32), 8.0, dtype=torch.float16)
    for out in (products.plain_linear(x, weight, None), products.packed_linear(x, packed_weights.pack(weight, 8), None)):
        assert out.item() == float("inf")
    small = products.plain_linear(x * 0 + 2**-12, weight * 0 + 2**-10, None)
    assert small.item() == 2**-17


@pytest.mark.usefixtures("isa")
def test_largest_codes_do_not_saturate():
    """Sums of pairs of products in 16 bits must hold 2 x 127 x 127."""
    for sign in (1.0, -1.0):
        weights = packed_weights.pack(torch.full((16, 32), sign), 8)
        matrix = packed_weights.unpack(weights, torch.float64)
        x = torch.ones(2, 32)
        x[1] = -1
        assert distance(products.packed_linear(x, weights, None), linear(x.double(), matrix)) < 1e-6


def test_packing_takes_parts_and_gives_the_same_matrix(monkeypatch):
    torch.manual_seed(2)
    weight = torch.randn(100, 64)
    for bits in (8, 4):
        whole = packed_weights.pack(weight, bits)
        with monkeypatch.context() as patched:
            patched.setattr(packed_weights, "CODES_AT_ONCE", 2 * 16 * 64)
            parts = packed_weights.pack(weight, bits)
            formed = products.formed_linear(torch.eye(64), parts, None)
        assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scales, parts.scales)
        assert torch.equal(formed.T, packed_weights.unpack(whole, torch.float32)[:100])


def test_gradients_reach_the_rows():
    weights, x = packed_weights.pack(torch.randn(16, 32), 8), torch.randn(2, 32, requires_grad=True)
    products.packed_linear(x, weights, None).sum().backward()
    assert torch.allclose(x.grad, packed_weights.unpack(weights, torch.float32).sum(0).expand(2, -1))


def test_products_without_the_extension_are_formed(monkeypatch):
    weights, x = packed_weights.pack(torch.randn(40, 64), 4), torch.randn(3, 64)
    expected = products.packed_linear(x, weights, None)
    monkeypatch.setattr(products, "instruction_set", lambda: None)
    assert distance(products.packed_linear(x, weights, None), expected) < 0.02


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 3.0, -7.5, 1e-30, 1e30])
def test_blocks_of_one_value_keep_it(bits, value):
    matrix = packed_weights.unpack(packed_weights.pack(torch.full((16, 32), value), bits), torch.float32)
    assert torch.allclose(matrix, torch.full((16, 32), value), rtol=0.01, atol=1e-36)
