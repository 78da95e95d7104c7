"""`--fast-memory` of `specache generate`."""

from __future__ import annotations

from tests.cli.running import one_line, run, run_json

PROMPT = "What is it? " * 30


def test_generate_refuses_with_the_flags_to_change(tiny_folder):
    """The library names settings, the command its options."""
    result = run("generate", "-m", tiny_folder, "--prompt", PROMPT, "--fast-memory", "500kB", "-n", "8", code=1)
    text = one_line(result.stderr)
    assert "--fast-memory allows 500,000" in text and "larger --fast-memory" in text and "fast_memory" not in text
    assert "--prefill-chunk" in text and "low-bit copy" in text
    assert result.stdout == ""


def test_generate_stays_within_what_it_was_given(tiny_folder):
    arguments = ("generate", "-m", tiny_folder, "--prompt", PROMPT, "--dtype", "float32", "-n", "8", "--prefill-chunk", "64")
    document = run_json(*arguments, "--fast-memory", "2MiB")
    assert document["config"]["fast_memory"] == 2**21
    assert 0 < document["stats"]["fast_memory_peak_bytes"] <= 2**21
    assert document["results"] == run_json(*arguments)["results"]


def test_a_size_that_is_none_is_refused(tiny_folder):
    result = run("generate", "-m", tiny_folder, "--prompt", PROMPT, "--fast-memory", "much", code=2)
    assert "--fast-memory 'much' is not a size" in one_line(result.stderr)
