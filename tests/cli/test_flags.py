"""Errors about settings name what the user typed."""

from __future__ import annotations

import pytest

from specache.cli.flags import in_flags
from specache.config import SpeCacheConfig
from specache.errors import ConfigError
from tests.cli.running import one_line, run

ALL = ("model", *SpeCacheConfig().to_dict())


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("group_size must divide a page.", "--group-size must divide a page."),
        ("slow_tier='ram-inplace' reads rows. Use slow_tier='ram'.", "--slow-tier ram-inplace reads rows. Use --slow-tier ram."),
        ("hot_set=1.5 is more than the whole cache.", "--hot-set 1.5 is more than the whole cache."),
        ("Raise fast_memory, use a smaller top_k or hot_set.", "Raise --fast-memory, use a smaller --top-k or --hot-set."),
        (
            "the folder /top_k/x and fast_memory.bin of residual tokens",
            "the folder /top_k/x and fast_memory.bin of residual tokens",
        ),
        ("bitsandbytes is missing.", "bitsandbytes is missing."),
    ],
)
def test_settings_are_flags_where_a_message_names_them(message, expected):
    assert in_flags(message, ALL) == expected


def test_a_setting_that_the_command_does_not_have_keeps_its_name():
    message = "top_k must be a positive number of pairs, got 0. Use policy='none'."
    assert in_flags(message, ("top_k",)) == "--top-k must be a positive number of pairs, got 0. Use policy='none'."
    assert in_flags(message, ("model", "methods")) == message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("bits", 3), ("group_size", 48), ("residual", -1), ("top_k", 0), ("long_top_k", 0), ("long_from", -1)),
        *(("prefill_chunk", 0), ("policy", "x"), ("slow_tier", "x")),
    ],
)
def test_the_error_message_of_every_setting_names_its_flag(setting, value):
    with pytest.raises(ConfigError) as error:
        SpeCacheConfig(**{setting: value})
    assert in_flags(str(error.value), ALL).startswith(f"--{setting.replace('_', '-')} must ")


@pytest.mark.parametrize("command", [["generate"], ["chat"], ["demo"], ["plan", "--context", "10"]])
def test_every_command_with_settings_says_flags(command):
    text = one_line(run(*command, "-m", "x", "--top-k", "0", code=2).stderr)
    assert "error: --top-k must be a positive number" in text
    assert "--policy none" in text and "--policy" in one_line(run(command[0], "--help").stdout)  # advice that can be taken


def test_settings_of_a_method_keep_their_names(tmp_path):
    result = run("eval", "fidelity", "-m", "x", "--out", tmp_path / "out", "--methods", "specache:top_k=0", code=2)
    assert "error: the method 'specache': top_k must be a positive number" in one_line(result.stderr)
