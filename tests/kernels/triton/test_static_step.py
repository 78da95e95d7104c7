"""A decode over static buffers on the Triton kernels equals the reference, also as a captured
graph.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import copy

import pytest
import torch
import triton
import triton.language as tl

from specache import reference
from specache.kernels import dispatch
from tests.cache.test_invariants import run, settings
from tests.device.simulated_graph import SimulatedGraphs
from tests.device.static_running import static_steps
from tests.tiny import llama, prompt

NEW = 6


@pytest.fixture(scope="module")
def model():
    return llama(num_hidden_layers=1)


def difference(model, monkeypatch, code, graphs):
    """Return the largest difference of the logits from the reference's; a group is quantised on the
    way.
    """
    config = settings(code=code, bits=2, residual=7, policy="verified", slow_tier="ram", prefill_chunk=4096)
    with dispatch.using("triton"), static_steps(monkeypatch, capacity_step=64, graphs=lambda device: graphs) as steps:
        tokens, logits, _ = run(model, prompt(53), config, new=NEW)
    assert steps == [1] * (NEW - 1)
    expected = reference.generate(model, prompt(53), config, NEW, forced_tokens=tokens)
    return (logits - expected.logits).abs().max()


@pytest.mark.parametrize(
    ("code", "graphs"), [("kivi", None), pytest.param("rotated", None, marks=pytest.mark.thorough), ("rotated", SimulatedGraphs())]
)
def test_a_decode_over_static_buffers_equals_the_reference(model, monkeypatch, code, graphs):
    assert difference(model, monkeypatch, code, graphs) < 1e-3
    assert graphs is None or graphs.replays == NEW - 3  # the first step of each kind is the warm-up


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.thorough)])
def test_the_callers_default_dtype_changes_nothing(model, monkeypatch, dtype):
    """Scores, peaks and sums are float32 whatever it is."""
    there, config = copy.deepcopy(model).to(dtype), settings(code="rotated", bits=2, residual=7, policy="verified", slow_tier="ram")

    def logits():
        with dispatch.using("triton"), static_steps(monkeypatch, capacity_step=64):
            return run(there, prompt(53), config, new=3)[1]

    expected, before = logits(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(logits(), expected)
    finally:
        torch.set_default_dtype(before)


@triton.jit
def shift_kernel(values, by, out, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(out + place, tl.load(values + place) + by)


def test_a_recorded_launch_runs_at_replays_with_the_numbers_it_had():
    """So a length that the host puts into a launch stays what it was, and shows as wrong tokens."""
    values, total, by = torch.zeros(4), torch.zeros(4), [1.0]

    def step():
        out = torch.empty(4)
        shift_kernel[(1,)](values, by[0], out, COUNT=4)
        total.add_(out)
        return total * 1

    replay, result = SimulatedGraphs().capture(step)
    assert total.tolist() == [0.0] * 4  # a capture runs nothing
    assert result.isnan().all()
    by[0] = 5.0
    for expected in (1.0, 2.0):
        replay()
        assert result.tolist() == [expected] * 4
    values.fill_(10.0)
    replay()
    assert result.tolist() == [13.0] * 4
    shift_kernel[(1,)](values, by[0], total, COUNT=4)  # afterwards launches run again
    assert total.tolist() == [15.0] * 4
