"""Errors cross the border of a process."""

from __future__ import annotations

import copy
import pickle

import pytest

from specache.errors import QueueFullError, SpeCacheError, UsageError
from specache.eval.results import Run
from specache.eval.runner import MethodFailedError, Outcome


@pytest.mark.parametrize(
    "error",
    [
        QueueFullError("64 requests wait.", 2.5),
        UsageError("wrong"),
        MethodFailedError("kivi failed", Outcome(Run({"task": "t"}, "score"), [], [])),
    ],
)
def test_an_error_in_a_pool_of_processes_reaches_the_caller(error: SpeCacheError):
    error.new_token_ids = [[1, 2]]
    for same in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(same) is type(error) and str(same) == str(error) and vars(same) == vars(error)
