"""Options become settings."""

from __future__ import annotations

import pytest

from specache.cli.cache_options import CacheOptions, parse_hot_set
from specache.cli.options import GenerationOptions
from specache.config import SpeCacheConfig
from specache.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.08", 0.08),
        ("0", 0.0),
        ("1", 1.0),
        (".5", 0.5),
        ("4096", 4096),
        ("64MB", 64_000_000),
        ("1GiB", 2**30),
        ("1.5 kb", 1500),
        ("1e3", 1000),
    ],
)
def test_hot_set_is_a_fraction_or_bytes(text, value):
    parsed = parse_hot_set(text)
    assert parsed == value
    assert isinstance(parsed, type(value))


@pytest.mark.parametrize("text", ["", "-1", "8%", "1 parsec", "nan", "1e400", "1e"])
def test_an_invalid_hot_set_is_refused(text):
    with pytest.raises(ConfigError, match="--hot-set"):
        parse_hot_set(text)


def test_a_hot_set_of_more_than_the_cache_is_no_size():
    with pytest.raises(ConfigError, match="more than the whole cache"):
        CacheOptions(hot_set="1.5").config()


@pytest.mark.parametrize(
    ("given", "samples"),
    [
        ({}, False),
        ({"temperature": 0.0}, False),
        ({"temperature": 0.0, "top_p": 0.9}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"temperature": 1e-50}, False),
        ({"temperature": 0.5}, True),
        ({"top_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"top_k_sampling": 5}, True),
    ],
)
def test_sampling_is_on_only_with_sampling_options(given, samples):
    assert GenerationOptions(max_new_tokens=1, **given).arguments()["do_sample"] is samples


def test_nothing_is_left_to_the_models_own_settings():
    sampling = GenerationOptions(max_new_tokens=1, temperature=0.5).arguments()
    assert sampling["top_k"] == 0 and sampling["top_p"] == 1.0
    assert GenerationOptions(max_new_tokens=1).arguments()["repetition_penalty"] == 1.0


def test_options_default_to_the_librarys_settings():
    assert CacheOptions().config() == SpeCacheConfig()
