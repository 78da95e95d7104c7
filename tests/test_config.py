"""What `SpeCacheConfig` fills in where a setting is left open."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from specache import SpeCacheConfig
from specache.config import DEFAULTS_OF_BITS, LONG_FROM, SUPPORTED_BITS, TopK
from specache.errors import ConfigError


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_fewer_bits_keep_and_fetch_more_pairs_at_16_bits(bits):
    config = SpeCacheConfig(bits=bits)
    assert {name: getattr(config, name) for name in ("residual", "top_k", "long_top_k")} == DEFAULTS_OF_BITS[bits]
    wider = {one: DEFAULTS_OF_BITS[one]["top_k"] for one in SUPPORTED_BITS}
    assert wider[1] > wider[2] > wider[4]


def test_none_is_the_default_and_a_number_is_kept():
    assert SpeCacheConfig(bits=1, top_k=None, residual=7) == SpeCacheConfig(bits=1, residual=7, top_k=256, long_top_k=512)  # type: ignore[arg-type]
    assert SpeCacheConfig(top_k=5, residual=0).left_open == {"long_top_k"}


def test_other_bits_bring_their_own_defaults_for_what_was_left_open():
    config = SpeCacheConfig(top_k=10).resolved("cpu").with_changes(bits=1)
    assert (config.bits, config.top_k, config.residual) == (1, 10, 256)


def test_changes_keep_open_what_they_do_not_name():
    config = SpeCacheConfig(top_k=10)
    assert config.with_changes(policy="none").left_open == {"residual", "long_top_k"}
    assert config.with_changes(bits=4, residual=5) == SpeCacheConfig(bits=4, residual=5, top_k=10)
    assert SpeCacheConfig().with_changes(bits=1, top_k=3) == SpeCacheConfig(bits=1, top_k=3)


def test_a_given_number_of_pairs_holds_at_every_length():
    assert SpeCacheConfig(top_k=10).selection == TopK(10, 10, LONG_FROM)
    assert SpeCacheConfig().with_changes(top_k=10).long_top_k == 10
    assert SpeCacheConfig(top_k=10).with_changes(top_k=20).long_top_k == 20
    assert SpeCacheConfig(top_k=10).with_changes(bits=1).long_top_k == 10
    assert SpeCacheConfig(top_k=10, long_top_k=30).with_changes(top_k=20).long_top_k == 30


def test_a_long_sequence_selects_more_pairs_by_default():
    selection = SpeCacheConfig().selection
    assert [selection.of(tokens) for tokens in (0, 50, LONG_FROM - 1, LONG_FROM)] == [0, 50, 128, 256]
    assert SpeCacheConfig(long_from=100).selection.of(100) == 100
    assert SpeCacheConfig(long_from=100).selection.of(10**6) == 256


@pytest.mark.parametrize("changes", [{"long_top_k": 0}, {"long_top_k": 2.5}, {"top_k": 9, "long_top_k": 8}, {"long_from": -1}])
def test_a_long_sequence_cannot_select_fewer(changes):
    with pytest.raises(ConfigError, match=r"long_(top_k|from) must be a number"):
        SpeCacheConfig(**changes)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_given_pairs_of_long_sequences_bound_those_of_shorter_ones(bits):
    """So that settings of fewer bits, which fetch more by default, are settings too."""
    config = SpeCacheConfig(long_top_k=40).with_changes(bits=bits)
    assert (config.top_k, config.long_top_k) == (40, 40)
    assert SpeCacheConfig(bits=bits, long_top_k=1000).top_k == DEFAULTS_OF_BITS[bits]["top_k"]


def test_what_is_left_open_is_taken_from_stored_settings():
    stored = SpeCacheConfig(residual=64, top_k=20, long_top_k=40)
    assert SpeCacheConfig().completed(stored) == stored
    assert SpeCacheConfig(top_k=100).completed(stored) == SpeCacheConfig(residual=64, top_k=100, long_top_k=100)
    assert SpeCacheConfig(residual=0, long_top_k=300).completed(stored) == SpeCacheConfig(residual=0, top_k=20, long_top_k=300)
    assert SpeCacheConfig(long_top_k=10).completed(stored) == SpeCacheConfig(residual=64, top_k=10, long_top_k=10)


def test_every_field_is_a_setting():
    """So that settings can be copied field by field, as evaluations and command lines do."""
    config = SpeCacheConfig()
    assert {field.name for field in dataclasses.fields(config)} == set(config.to_dict())
    assert dataclasses.replace(config, **config.to_dict()) == config


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_leaves_the_same_settings_open(copied):
    config = SpeCacheConfig(top_k=10)
    assert copied(config) == config and copied(config).left_open == {"residual", "long_top_k"}


@pytest.mark.parametrize(
    ("tier", "device", "policy"),
    [
        ("auto", "cpu", "on-demand"),
        ("ram-inplace", "cpu", "on-demand"),
        ("ram", "cpu", "on-demand"),
        ("disk:rows", "cpu", "verified"),
        ("auto", "cuda", "verified"),
        ("ram", "cuda", "verified"),
        ("disk:rows", "cuda", "verified"),
    ],
)
def test_auto_is_decided_by_where_the_rows_are(tier, device, policy):
    assert SpeCacheConfig(slow_tier=tier).resolved(device).policy == policy
    assert SpeCacheConfig(slow_tier=tier, policy="speculative").resolved(device).policy == "speculative"
