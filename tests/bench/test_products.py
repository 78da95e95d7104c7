"""`bench products`: every matrix in every format, cold, as a share of a plain read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specache.bench import plain_read, products
from specache.bench.base import BenchContext, Result
from specache.bench.products import FORMATS, Products, matrices, module_bytes
from specache.bench.shapes import SHAPES, Weights
from specache.cli.bench_table import result_table
from specache.errors import ConfigError
from specache.linear.weight_quant import Int4Linear, Int8Linear
from tests.bench.tiny_shape import TINY


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(products, "MOST_COPIES", 3)


def run(**settings: Any) -> list[Result]:
    settings = {"shape": ("tiny",), "rows": (1, 2), "repeat": 2, **settings}
    return Products(**settings).run(BenchContext()).results


def test_the_matrices_of_a_model_by_size():
    found = {matrix.name: (matrix.outputs, matrix.inputs) for matrix in matrices(TINY)}
    assert found == {"q o": (64, 64), "k v": (32, 64), "gate up": (96, 64), "down": (64, 96), "head": (97, 64)}
    assert len(matrices(SHAPES["llama-3-8b"])) == 5


def test_every_matrix_format_and_number_of_rows_has_a_result():
    results = run(formats=("fp32", "bf16", "int8"))
    assert [(r["matrix"], r["format"], r["rows"]) for r in results] == [
        (matrix.name, weights, rows) for matrix in matrices(TINY) for weights in ("fp32", "bf16", "int8") for rows in (1, 2)
    ]
    for result in results:
        assert result["gb_per_s"] == pytest.approx(result["bytes"] / result["ms"] / 1e6)
        assert result["vs_torch"] > 0 and result["shape"] == "tiny"
        assert result["difference"] < {"fp32": 1e-5, "bf16": 0.01, "int8": 0.05}[result["format"]]
    shares = {result["vs_read"] / result["gb_per_s"] for result in results}
    assert max(shares) == pytest.approx(min(shares))  # one bandwidth for all


def test_codes_at_4_bits_differ_by_their_rounding_and_take_an_eighth_of_float32(monkeypatch):
    monkeypatch.setattr(products, "matrices", lambda shape: [products.Matrix("q", 64, 128)])
    wide, four = run(formats=("fp32", "int4"), rows=(1,))
    assert 0.01 < four["difference"] < 0.3
    assert wide["bytes"] == 64 * 128 * 4 and 64 * 128 // 2 < four["bytes"] < wide["bytes"] / 4


def test_the_layers_of_a_model_are_measured_and_their_forwards_given_back(monkeypatch):
    seen: list[tuple[str, bool]] = []
    measure = products.interleaved

    def watched(functions: Any, *arguments: Any, **settings: Any) -> Any:
        ours, stock = (function.__closure__ for function in functions.values())
        modules = [next(c.cell_contents for c in cells if isinstance(c.cell_contents, list)) for cells in (ours, stock)]
        seen.append((type(modules[0][0]).__name__, "forward" in modules[1][0].__dict__))
        assert len({tensor.data_ptr() for module in modules[0] for tensor in (*module.parameters(), *module.buffers())}) >= 3
        return measure(functions, *arguments, **settings)

    monkeypatch.setattr(products, "interleaved", watched)
    monkeypatch.setattr(products, "matrices", lambda shape: [products.Matrix("q", 64, 64)])
    run(formats=tuple(map(str, FORMATS)), rows=(1,))
    assert seen == [("Linear", False), ("Linear", False), ("Int8Linear", False), ("Int4Linear", False)]


def test_weights_are_cold_before_every_sample(monkeypatch):
    events: list[str] = []
    read, forward = plain_read.LargeArray.read, Int8Linear.forward
    monkeypatch.setattr(plain_read.LargeArray, "read", lambda self: (events.append("read"), read(self))[1])
    monkeypatch.setattr(Int8Linear, "forward", lambda self, x: (events.append("product"), forward(self, x))[1])
    monkeypatch.setattr(products, "matrices", lambda shape: [products.Matrix("q", 64, 64)])
    run(formats=("int8",), rows=(1,), repeat=4)
    assert events.count("read") == 2 * (4 + 1)  # ours and PyTorch's, with the warm-up
    text = "".join(event[0] for event in events)
    assert text.count("rppp") == 5


def test_a_prompts_rows_leave_the_head_out():
    assert "head" not in {result["matrix"] for result in run(formats=("fp32",), rows=(16,))}


def test_a_matrix_without_room_is_skipped_and_the_reason_shown(monkeypatch):
    monkeypatch.setattr(products, "available_memory", lambda: 64 * 96 * products.WORKING_BYTES - 1)
    outcome = Products(shape=("tiny",), rows=(1,), repeat=1, formats=("fp32",)).run(BenchContext())
    skipped = [result["matrix"] for result in outcome.results if result["skipped"]]
    assert skipped == ["gate up", "down", "head"]
    lines = [str(part) for part in result_table(outcome.results, Products.columns, outcome.details).renderables]
    assert any(line.startswith("tiny head fp32, 1 rows, was skipped: needs") for line in lines)


def test_the_bytes_are_those_of_codes_and_scales():
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    for module in (Int8Linear(weight, None), Int4Linear(weight, None)):
        assert module_bytes(module) == sum(buffer.nbytes for buffer in module.buffers()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": ("fp8",)}, "got fp8"),
        ({"formats": ()}, "got nothing"),
        ({"rows": (0,)}, "--rows"),
        ({"shape": ("gpt-5",)}, "smollm2-135m"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Products(**settings)


def test_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="--device cpu"):
        Products().run(BenchContext(device="cuda"))


def test_every_format_is_a_number_format_of_weights():
    assert set(FORMATS) <= set(Weights)
