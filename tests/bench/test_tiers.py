"""`bench tiers`: every tier and policy decodes the same prompt, interleaved."""

from __future__ import annotations

import pytest

from specache.bench.base import BenchContext
from specache.bench.tiers import Tiers
from specache.errors import BenchmarkError, ConfigError
from tests.bench.tiny_shape import tiny_model


def test_tiers_and_policies_are_measured_and_compared(tmp_path):
    benchmark = Tiers(
        context=400,
        steps=4,
        rounds=2,
        top_k=8,
        tiers=("ram-inplace", "ram", "disk"),
        policies=("verified", "on-demand"),
        dir=tmp_path,
    )
    outcome = benchmark.run(BenchContext(tiny_model()))
    measured = {(result["tier"], result["policy"]): result for result in outcome.results}
    assert list(measured) == [(tier, policy) for tier in ("ram-inplace", "ram", "disk") for policy in ("verified", "on-demand")]
    for (tier, policy), result in measured.items():
        assert result["context"] == 400 and result["ms_per_step"] > 0
        assert result["vs_ram"] == pytest.approx(result["ms_per_step"] / measured["ram", policy]["ms_per_step"])
        if tier == "ram-inplace":
            assert result["rows_ready"] is None and result["fetched_bytes_per_step"] == 0
        else:
            assert 0 <= result["rows_ready"] <= 1 and result["hot_ratio"] > 0
    assert 0 <= measured["disk", "on-demand"]["read_hidden"] < 1  # nothing is read a step ahead
    assert measured["disk", "verified"]["rows_ready"] == measured["ram", "verified"]["rows_ready"]  # the same tokens
    assert outcome.details["disk_reader"]["name"]
    assert list(tmp_path.iterdir()) == []


def test_settings_that_cannot_be_measured_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--tiers takes"):
        Tiers(tiers=("ram", "tape"))
    with pytest.raises(ConfigError, match="--policies takes"):
        Tiers(policies=("none",))
    with pytest.raises(ConfigError, match="--steps"):
        Tiers(steps=0)
    with pytest.raises(ConfigError, match="--text"):
        Tiers(context=64, text=tmp_path / "book.txt").run(BenchContext(tiny_model()))
    with pytest.raises(BenchmarkError, match="no folder can be made"):
        Tiers(context=64, dir=tmp_path / "nowhere").run(BenchContext(tiny_model()))
