"""What `SpeCacheConfig` fills in where a setting is left open."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from specache import SpeCacheConfig
from specache.config import DEFAULTS_OF_BITS, SUPPORTED_BITS


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_fewer_bits_keep_and_fetch_more_pairs_at_16_bits(bits):
    config = SpeCacheConfig(bits=bits)
    assert {"residual": config.residual, "top_k": config.top_k} == DEFAULTS_OF_BITS[bits]
    wider = {one: DEFAULTS_OF_BITS[one]["top_k"] for one in SUPPORTED_BITS}
    assert wider[1] > wider[2] > wider[4]


def test_none_is_the_default_and_a_number_is_kept():
    assert SpeCacheConfig(bits=1, top_k=None, residual=7) == SpeCacheConfig(bits=1, residual=7, top_k=256)  # type: ignore[arg-type]
    assert SpeCacheConfig(top_k=5, residual=0).left_open == frozenset()


def test_other_bits_bring_their_own_defaults_for_what_was_left_open():
    config = SpeCacheConfig(top_k=10).resolved("cpu").with_changes(bits=1)
    assert (config.bits, config.top_k, config.residual) == (1, 10, 256)


def test_changes_keep_open_what_they_do_not_name():
    config = SpeCacheConfig(top_k=10)
    assert config.with_changes(policy="none").left_open == {"residual"}
    assert config.with_changes(bits=4, residual=5) == SpeCacheConfig(bits=4, residual=5, top_k=10)
    assert SpeCacheConfig().with_changes(bits=1, top_k=3) == SpeCacheConfig(bits=1, top_k=3)


def test_every_field_is_a_setting():
    """So that settings can be copied field by field, as evaluations and command lines do."""
    config = SpeCacheConfig()
    assert {field.name for field in dataclasses.fields(config)} == set(config.to_dict())
    assert dataclasses.replace(config, **config.to_dict()) == config


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_leaves_the_same_settings_open(copied):
    config = SpeCacheConfig(top_k=10)
    assert copied(config) == config and copied(config).left_open == {"residual"}


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
