"""Step times from measurements: interpolation between points, and lines fitted through samples."""

from __future__ import annotations

import pytest

from specache.bench import calibration
from specache.bench.calibration import _cost, _extrapolated, _Sample
from specache.config import SpeCacheConfig
from specache.errors import ConfigError
from specache.linear.weight_format import WeightFormat
from specache.model.dimensions import dimensions_of, without_weights
from specache.planning.roofline.compared_methods import methods
from specache.planning.roofline.measured import MeasuredSteps, MethodCost, WeightsPass
from tests.bench.tiny_shape import TINY
from tests.planning.roofline.hand import method


def test_the_time_of_a_weights_pass_is_interpolated_between_measurements():
    found = WeightsPass((1, 2, 8), (1.0, 1.1, 2.3))
    assert [found.at(rows) for rows in (1, 2, 5, 8, 16)] == pytest.approx([1.0, 1.1, 1.7, 2.3, 3.9])
    assert WeightsPass((1,), (0.5,)).at(100) == 0.5


def test_a_measured_step_is_the_sum_of_its_costs():
    steps = MeasuredSteps(WeightsPass((1, 2), (0.1, 0.1)), {"paper-2": MethodCost(0.01, 0.002, 1e-6)}, 4, (2, 1))
    step = steps.step(method("paper-2"), 1000, 3)
    assert step.total == pytest.approx(0.1 + 0.01 + 3 * 0.002 + 3 * 1000 * 1e-6)
    assert step.hidden == 0 and step.scan_bound == "measured"
    with pytest.raises(ConfigError, match="16-bit cache was not measured; there is paper-2"):
        steps.step(method("full"), 1000, 3)


def test_fitted_lines_recover_the_costs_behind_the_samples():
    """Samples of 8 and 2 of 32 layers.

    Kernel time is per layer; the rest has a share of the model's own.
    """

    def sample(layers: int, context: int, batch: int) -> _Sample:
        kernels = layers * (1e-4 + 2e-4 * batch + 3e-8 * batch * context)
        rest = 5e-3 + 1e-4 * layers + 1e-3 * batch + 2e-5 * layers * batch
        return _Sample(layers, context, batch, 0.05 + kernels + rest, kernels, 0.05)

    found = _cost([sample(layers, context, batch) for layers in (8, 2) for context in (2048, 8192) for batch in (1, 4)], 32)
    assert found.fixed == pytest.approx(32 * 1e-4 + 5e-3 + 32 * 1e-4, rel=1e-6)
    assert found.per_sequence == pytest.approx(32 * 2e-4 + 1e-3 + 32 * 2e-5, rel=1e-6)
    assert found.per_token == pytest.approx(32 * 3e-8, rel=1e-6)


@pytest.mark.parametrize(
    ("deep", "shallow", "expected"),
    [
        (5.0, 2.0, 17.0),  # 0.5 per layer, and 1 fixed
        (5.0, 6.0, 5.0),  # noise: layers that take less than nothing
        (8.0, 0.5, 32.0),  # noise: a model that does beside its layers
    ],
)
def test_a_deeper_model_takes_longer_and_not_more_than_in_proportion(deep, shallow, expected):
    assert _extrapolated([8, 2], [deep, shallow], 32) == pytest.approx(expected)


def test_calibration_measures_a_tiny_model_and_leaves_its_config(monkeypatch):
    import torch

    monkeypatch.setattr(calibration, "CONTEXTS", (192, 320))
    monkeypatch.setattr(calibration, "ROWS", (1, 2))
    config = TINY.config()
    config.num_hidden_layers = 8
    compared = methods(SpeCacheConfig().resolved("cpu"))
    model = dimensions_of(without_weights(config, torch.bfloat16), device="cpu")
    messages: list[str] = []
    steps = calibration.measured_steps(config, torch.bfloat16, WeightFormat.AUTO, model, compared, messages.append)
    assert config.num_hidden_layers == 8  # the caller's config is unchanged
    assert steps.layers == 8 and steps.measured_layers == (4, 1)
    assert set(steps.costs) == {one.key for one in compared}
    assert all(steps.step(one, 1000, 2).total > 0 for one in compared)


def test_a_model_with_differing_layers_is_measured_whole_or_refused():
    from dataclasses import replace

    from tests.planning.roofline.hand import MODEL

    hybrid = replace(MODEL, layers=(MODEL.layers[0], replace(MODEL.layers[0], window=64)) * 4)
    assert calibration._depths(hybrid) == [8]
    with pytest.raises(ConfigError, match="--gpu-spec FILE"):
        calibration._depths(replace(hybrid, weight_bytes=10**10))
    assert calibration._depths(replace(MODEL, layers=MODEL.layers * 32)) == [16, 4]
    assert calibration._depths(replace(MODEL, layers=MODEL.layers * 32, weight_bytes=16 * 10**9)) == [4, 1]
    assert calibration._depths(MODEL) == [1]


def test_this_processors_figures_name_the_measurement(monkeypatch):
    monkeypatch.setattr(calibration, "PRODUCT", 64)
    monkeypatch.setattr(calibration, "LargeArray", lambda: calibration_array())
    device = calibration.this_processor(repeat=1)
    assert device.kind == "cpu" and device.memory_gb_per_s > 0 and device.matrix_tflops > 0
    assert device.source_of("memory_gb_per_s").startswith("measured here")


def calibration_array():
    from specache.bench.plain_read import LargeArray

    return LargeArray(1 << 20)


@pytest.mark.parametrize(("fixed", "weights"), [(-0.002, 0.008), (-1.0, 0.0064), (0.003, 0.010)])
def test_faster_layers_shorten_a_pass_by_at_most_nine_tenths(fixed, weights):
    noisy = WeightsPass((1, 2), (0.010, 0.004))  # as measured on a busy machine
    assert noisy.at(1) == 0.010 and noisy.at(8) == 0.004  # more rows never take less than the fastest pass
    steps = MeasuredSteps(noisy, {"full": MethodCost(fixed, 0.0, 0.0)}, 4, (2, 1))
    step = steps.step(method("full"), 100, 1)
    assert (step.weights, step.overhead) == (pytest.approx(weights), max(0.0, fixed))
