"""An answer ends where the model's positions end, with a note.

A prompt that leaves none is refused.
"""

from __future__ import annotations

import pytest

from specache import UsageError
from specache.engine.answer_length import DEFAULT_MAX_NEW_TOKENS, answer_limit
from tests.cli.running import one_line, run, run_json
from tests.cli.tiny_chat import POSITIONS


@pytest.fixture
def tiny(tiny_folder):
    return ("generate", "-m", tiny_folder, "--dtype", "float32", "--raw")


def test_an_answer_requested_too_long_is_shortened_with_a_note(tiny):
    document = run_json(*tiny, "-n", "60", "--prompt", "x" * (POSITIONS - 20))
    result = document["results"][0]
    assert result["prompt_tokens"] + result["new_tokens"] <= POSITIONS
    assert result["finish_reason"] == "length"
    assert document["warnings"] == [
        "The model has 512 positions and the prompt takes 492: an answer can have 20 new tokens at most, not 60."
    ]
    said = one_line(run(*tiny, "-n", "60", "--prompt", "x" * (POSITIONS - 20)).stderr)
    assert said.count("warning: ") == 1 and "20 new tokens at most, not 60" in said


def test_an_answer_that_fits_has_no_note(tiny):
    assert "warnings" not in run_json(*tiny, "-n", "20", "--prompt", "x" * (POSITIONS - 20))


def test_the_longest_prompt_of_a_batch_limits_the_answers(tiny, tmp_path):
    for name, length in (("long", POSITIONS - 3), ("short", 10)):
        (tmp_path / name).write_text("x" * length)
    document = run_json(*tiny, "-n", "9", "--prompt-file", tmp_path / "long", "--prompt-file", tmp_path / "short")
    assert max(result["new_tokens"] for result in document["results"]) == 3 and len(document["warnings"]) == 1


def test_a_prompt_that_leaves_no_position_is_refused(tiny):
    for length in (POSITIONS, POSITIONS + 1):
        said = one_line(run(*tiny, "-n", "1", "--prompt", "x" * length, code=1).stderr)
        assert f"error: The prompt has {length} tokens but the model has positions for {POSITIONS}" in said


def test_the_default_length_is_shortened_with_a_note_only_if_the_answer_reaches_it():
    assert answer_limit(None, 1000, 900).new_tokens == 100
    assert answer_limit(None, 1000, 900).note(reached=False) is None
    assert "100 new tokens" in str(answer_limit(None, 1000, 900).note(reached=True))
    assert "100 new tokens" in str(answer_limit(200, 1000, 900).note(reached=False))
    assert answer_limit(None, 1000, 100).new_tokens == DEFAULT_MAX_NEW_TOKENS
    with pytest.raises(UsageError, match="positions for 1,000"):
        answer_limit(5, 1000, 1000)


def test_a_model_without_a_limit_does_not_shorten_answers():
    assert answer_limit(10**6, None, 10**6).new_tokens == 10**6
    assert answer_limit(None, None, 10**6).note(reached=True) is None
