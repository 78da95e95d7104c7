"""Numbers that no command has use for are mistakes of usage: exit code 2 and the range, before
anything is loaded.
"""

from __future__ import annotations

import pytest

from specache.cli.numbers import check_numbers
from specache.errors import ConfigError
from tests.cli.running import one_line, run

HUGE = str(10**30)
GENERATE = ("generate", "-m", "./nothing-is-loaded", "--prompt", "x")
PLAN = ("plan", "--shape", "llama-3-8b", "--context", "1000")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*GENERATE, "-n", "0"), "--max-new-tokens must be 1 or more"),
        ((*GENERATE, "-n", "-5"), "--max-new-tokens must be 1 or more"),
        ((*GENERATE, "-n", HUGE), "--max-new-tokens must be at most 2,147,483,647"),
        ((*GENERATE, "--temperature", "-1"), "--temperature"),
        ((*GENERATE, "--temperature", "nan"), "--temperature"),
        ((*GENERATE, "--temperature", "1e400"), "--temperature must be a finite number"),
        ((*GENERATE, "--top-p", "2"), "--top-p"),
        ((*GENERATE, "--min-p", "nan"), "--min-p"),
        ((*GENERATE, "--repetition-penalty", "inf"), "--repetition-penalty must be a finite number"),
        ((*GENERATE, "--top-k-sampling", "0"), "--top-k-sampling"),
        ((*GENERATE, "--seed", "-1"), "--seed must be from 0 to 18,446,744,073,709,551,615"),
        ((*GENERATE, "--seed", str(2**64)), "--seed must be from 0 to"),
        ((*GENERATE, "--threads", HUGE), "--threads must be from 1 to"),
        ((*GENERATE, "--top-k", HUGE), "--top-k must be at most"),
        ((*GENERATE, "--residual", HUGE), "--residual must be at most"),
        ((*GENERATE, "--fast-memory", "0"), "is not a size above 0"),
        ((*GENERATE, "--fast-memory", "-5GB"), "is not a size above 0"),
        ((*GENERATE, "--hot-set", "nan"), "--hot-set"),
        (("chat", "-m", "./nothing-is-loaded", "--seed", "-1"), "--seed must be from 0"),
        ((*PLAN, "--context", "0"), "--context must be 1 token or more"),
        ((*PLAN, "--context", HUGE), "--context must be at most"),
        ((*PLAN, "--batch", "-1"), "--batch must be from 1"),
        (("demo", "--seed", "-1"), "--seed must be from 0"),
        (("eval", "fidelity", "-m", "x", "--out", "x", "--lengths", HUGE), "--lengths must be at most"),
        (("eval", "needle", "-m", "x", "--out", "x", "--seed", "-1"), "--seed must be from 0"),
        (("eval", "needle", "-m", "x", "--out", "x", "--documents", HUGE), "--documents must be at most"),
        (("bench", "decode", "-m", "x", "--batch", HUGE), "--batch must be at most"),
        (("bench", "scaling", "-m", "x", "--contexts", HUGE), "--contexts must be at most"),
        (("bench", "attention", "--shape", "llama-3-8b", "--context", "512", "--seed", "-1"), "--seed must be from 0"),
    ],
)
def test_a_number_out_of_range_is_a_mistake_of_usage(arguments, message):
    assert message in one_line(run(*arguments, code=2).stderr)


def test_the_bounds_of_a_range_are_accepted():
    check_numbers({"seed": 0, "threads": 1, "context": 2**31 - 1, "temperature": 0.0, "session": None, "compile": True})
    check_numbers({"seed": 2**64 - 1})
    with pytest.raises(ConfigError):
        check_numbers({"threads": 0})
