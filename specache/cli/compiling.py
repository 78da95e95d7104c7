"""Compiled decode steps: `--compile`, `--no-compile`, and which commands compile by themselves.

Compiled code is loaded, or with `--compile` made, before the first prompt is read, outside of all
measured times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specache.config import Policy, SlowTierKind, SpeCacheConfig

ONE_AND_TWO_ROWS = SpeCacheConfig(policy=Policy.VERIFIED, slow_tier=SlowTierKind.RAM)
"""Pre-decoding has one row and a step two: every pass that any policy makes."""


def compile_model(
    model: Any, config: SpeCacheConfig, sequences: int, asked: bool | None, new_tokens: int | None, say: Callable[[str], None]
) -> None:
    """Compile the decode steps that `config` uses, if asked to or if it pays.

    It pays for long answers whose code is in the cache folder. If it is not there, a child process
    compiles it, for later answers of this process and for other processes.

    Args:
        sequences: those of an answer.
        asked: `--compile` or `--no-compile`; `None` decides by `new_tokens`.
        new_tokens: those expected in all answers of this process; `None` never compiles unasked.

    Raises:
        ConfigError: there is no C++ compiler, it fails, or the model's step cannot be a fixed
            graph.
    """
    from specache.engine import compiled
    from specache.engine.decoder import prepare_compiled

    policy = config.resolved(model.device.type).policy
    pays = new_tokens is not None and new_tokens >= compiled.LONG_ANSWER and policy is not Policy.FULL
    if not asked and (asked is False or not pays or not compiled.is_faster(model)):
        return
    compiled.compile_decode(model, background=not asked)
    if asked or compiled.is_cached(model, policy, sequences):
        say("Compiling the decode step" if asked else "Loading the compiled decode step")
        prepare_compiled(model, policy, sequences)
