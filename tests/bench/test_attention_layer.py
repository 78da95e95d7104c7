"""`bench attention`: all implementations compute the same, and the ratios are right."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from specache.bench import kernel_backends
from specache.bench.attention_layer import Attention
from specache.bench.base import BenchContext, Outcome
from specache.bench.one_layer import LowBitLayer
from specache.bench.static_layer import StaticLayer
from specache.bench.synthetic import synthetic_rows
from specache.bench.torch_attention import QuantisedTensor, dequantising_baseline, exact_baselines, gpu_baselines, sdpa
from specache.config import Code
from specache.errors import ConfigError

CONTEXT = 192
KEYS = {"impl", "isa", "bits", "rows", "context", "ms", "gb_per_s", "vs_sdpa_bf16", "vs_best_torch", "vs_floor"}


def rows_and_query(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = synthetic_rows(2, CONTEXT, 16, torch.bfloat16, seed=3)
    query = torch.randn(1, 4, rows, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return query, keys, values


@pytest.mark.parametrize("rows", [1, 2])
def test_every_exact_baseline_is_attention(rows):
    query, keys, values = rows_and_query(rows)
    expected = sdpa(query.float(), keys.float(), values.float())
    baselines = exact_baselines(query, keys, values)
    assert len({baseline.impl for baseline in baselines}) == 6
    for baseline in baselines:
        tolerance = 1e-5 if baseline.bits == 32 else 0.03
        assert (baseline.run().float() - expected).abs().max() < tolerance, baseline.impl
        assert baseline.nbytes == 2 * keys.numel() * baseline.bits // 8


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_dequantised_layer_is_within_half_a_step(bits):
    tensor = synthetic_rows(2, CONTEXT, 16, torch.float32, seed=5)[0]
    quantised = QuantisedTensor(tensor, bits)
    groups = tensor.reshape(-1, 64)
    step = (groups.amax(1) - groups.amin(1)) / (2**bits - 1)
    error = (quantised.dequantise().float().reshape(-1, 64) - groups).abs().amax(1)
    assert (error <= 0.5 * step + 0.03 * groups.abs().amax(1)).all()
    assert quantised.nbytes == tensor.numel() * bits // 8 + 2 * 2 * tensor.numel() // 64


def test_dequantising_first_is_attention_over_the_codes():
    query, keys, values = rows_and_query(1)
    expected = sdpa(query, QuantisedTensor(keys, 4).dequantise(), QuantisedTensor(values, 4).dequantise())
    assert torch.equal(dequantising_baseline(query, keys, values, 4).run(), expected)


@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize("rows", [1, 2])
def test_our_layer_is_exact_if_every_pair_is_swapped_in(code, rows):
    query, keys, values = rows_and_query(rows)
    out = LowBitLayer(keys, values, code, bits=2, top_k=CONTEXT).attend(query)
    for row in range(rows):  # the second one sees its own token too
        seen_keys, seen_values = (torch.cat([x, x[:, -1:]], dim=1)[:, : CONTEXT + row].float() for x in (keys, values))
        assert (out[:, :, row] - sdpa(query[:, :, row : row + 1].float(), seen_keys, seen_values)[:, :, 0]).abs().max() < 1e-5
    approximate = LowBitLayer(keys, values, code, bits=2, top_k=4).attend(query)
    assert (approximate - out).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, 2])
def test_every_step_copies_all_selected_rows(rows):
    """As on a GPU: the query never changes, so rows kept from one step would serve the next."""
    query, keys, values = rows_and_query(rows)
    in_place, copied = (LowBitLayer(keys, values, Code.ROTATED, bits=2, top_k=8, copied=one) for one in (False, True))
    row_bytes = 2 * 16 * keys.element_size()
    for step in range(1, 4):
        out = copied.attend(query)
        assert (out[:, :, 0] - in_place.attend(query)[:, :, 0]).abs().max() < 1e-5
        assert copied.fetched.bytes_fetched >= step * 2 * 8 * row_bytes
    assert in_place.fetched.bytes_fetched == 0


def run(**settings: Any) -> Outcome:
    return Attention(shape="tiny", context=(CONTEXT,), repeat=2, top_k=8, **settings).run(BenchContext())


def test_results_have_all_columns_and_ratios_are_speed_ups():
    outcome = run(bits=(1, 2), rows=(1, 2))
    assert all(result.keys() >= KEYS for result in outcome.results)
    for rows in (1, 2):
        results = [result for result in outcome.results if result["rows"] == rows]
        assert {result["bits"] for result in results if result["impl"] == "specache"} == {1, 2}
        fused = next(result for result in results if result["impl"] == "sdpa bf16")
        whole = [result for result in results if result["bits"] >= 16]
        best = min(result["ms"] for result in whole)
        best_matmul = min(result["ms"] for result in whole if result["impl"].startswith("matmul"))
        bandwidth = next(entry for entry in outcome.details["bandwidth"] if entry["rows"] == rows)
        for result in results:
            assert result["vs_sdpa_bf16"] == pytest.approx(fused["ms"] / result["ms"])
            assert result["vs_best_torch"] == pytest.approx(best / result["ms"])
            assert result["vs_best_matmul"] == pytest.approx(best_matmul / result["ms"])
            assert result["gb_per_s"] == pytest.approx(result["bytes"] / result["ms"] / 1e6)
            assert result["vs_floor"] == pytest.approx(result["ms"] / (result["bytes"] / bandwidth["read_gb_per_s"] / 1e6))


def test_our_layer_reads_fewer_bytes_at_fewer_bits():
    ours = {result["bits"]: result["bytes"] for result in run(bits=(1, 2, 4)).results if result["impl"] == "specache"}
    assert ours[1] < ours[2] < ours[4] < 2 * 2 * CONTEXT * 2 * 16


def test_each_measurement_runs_on_its_own_kernel_backend(monkeypatch):
    serving, seen = ["torch"], set()

    @contextmanager
    def using(name: str):
        serving.append(name)
        yield
        serving.pop()

    attend = LowBitLayer.attend

    def watched(self: LowBitLayer, *arguments: Any) -> torch.Tensor:
        seen.add(serving[-1])
        return attend(self, *arguments)

    monkeypatch.setattr(kernel_backends, "available", lambda: ["torch", "generic", "avx2"])
    monkeypatch.setattr(kernel_backends, "using", using)
    monkeypatch.setattr(LowBitLayer, "attend", watched)
    results = run().results
    assert [result["isa"] for result in results if result["impl"] == "specache"] == ["torch", "generic", "avx2"]
    assert seen == {"torch", "generic", "avx2"}
    assert [r["isa"] for r in run(kernels=("avx2",)).results if r["impl"] == "specache"] == ["avx2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": (100,)}, "multiples of 64"),
        ({"bits": (3,)}, "1, 2, 4"),
        ({"rows": ()}, "--rows"),
        ({"shape": "gpt-5"}, "smollm2-135m"),
        ({"kernels": ("abacus",)}, "no kernels abacus"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Attention(**settings)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("rows", [1, 2])
def test_static_buffers_give_the_same_output_in_every_round(rows, bits):
    """Repeated calls give the same output, as the rounds of a benchmark need."""
    query, keys, values = rows_and_query(rows)
    ordinary, taken = (LowBitLayer(keys, values, Code.ROTATED, bits, top_k=8, copied=True) for _ in range(2))
    static = StaticLayer(taken, rows, keys.dtype)
    for one in (query, -query, query):
        with kernel_backends.using(kernel_backends.PLAIN):
            expected = ordinary.attend(one)
        difference = (static.attend(one) - expected)[:, :, :1].abs().max()  # the draft row uses only what was fetched
        assert difference <= 2.0**-7 * expected.abs().max()  # rounded to the model's bfloat16
    assert static.nbytes == ordinary.nbytes


def test_a_gpu_has_a_result_for_the_static_step(monkeypatch):
    monkeypatch.setattr(kernel_backends, "layers_on", lambda device: [kernel_backends.PLAIN, kernel_backends.STATIC])
    results = Attention(shape="tiny", context=(CONTEXT,), rows=(2,), top_k=8, repeat=1).run(BenchContext()).results
    ours = [row for row in results if row["impl"] == "specache"]
    assert [row["isa"] for row in ours] == ["torch", "static"]
    assert ours[1]["ms"] > 0 and ours[1]["phases"] is None and ours[1]["difference"] < 0.05


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("copied", [False, True])
def test_every_sequence_of_a_batch_attends_as_alone(rows, copied):
    query, keys, values = rows_and_query(rows)
    queries = torch.cat([query, query.flip(2) * 0.5, -query])
    batch = LowBitLayer(keys, values, Code.ROTATED, bits=2, top_k=8, copied=copied, batch=3).attend(queries)
    for found, one in zip(batch, queries, strict=True):
        alone = LowBitLayer(keys, values, Code.ROTATED, bits=2, top_k=8, copied=copied).attend(one[None])
        assert (found - alone[0]).abs().max() < 1e-5


def test_a_gpus_baselines_are_attention_in_every_sequence():
    query, keys, values = rows_and_query(2)
    queries = torch.cat([query, -query])
    for baseline in [*gpu_baselines(queries, keys, values), *exact_baselines(queries, keys, values)]:
        for found, one in zip(baseline.run(), queries, strict=True):
            assert (found.float() - sdpa(one[None].float(), keys.float(), values.float())[0]).abs().max() < 0.03, baseline.impl
        assert baseline.nbytes == 2 * 2 * keys.numel() * baseline.bits // 8


def test_a_batch_reads_as_many_bytes_per_sequence():
    one, four = (next(r for r in run(batch=batch).results if r["impl"] == "specache") for batch in (1, 4))
    assert four["bytes"] == 4 * one["bytes"]
    assert (one["batch"], four["batch"]) == (1, 4)
