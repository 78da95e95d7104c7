"""`--compile`: compile before reading the first prompt, outside of all measured times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.errors import ConfigError

ONE_AND_TWO_ROWS = SpeCacheConfig(policy=Policy.VERIFIED, slow_tier=SlowTierKind.RAM)
"""Pre-decoding has one row and a step two: every pass that any policy makes."""


def compile_model(model: Any, config: SpeCacheConfig, sequences: int, say: Callable[[str], None]) -> None:
    """Compile the decode steps that `config` uses, for one sequence and, if there will be more, for
    several.

    Raises:
        ConfigError: there is no C++ compiler, it fails, or the model's step cannot be a fixed
            graph.
    """
    import specache
    from specache.platform import private_torch

    specache.compile_decode(model)
    say("Compiling the decode step")
    try:
        for count in (1, 2) if sequences > 1 else (1,):
            _decode(model, config, count)
    except private_torch.compiler_error() as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"PyTorch cannot compile this model here. Leave out --compile. It said: {reason}") from error


def _decode(model: Any, config: SpeCacheConfig, count: int) -> None:
    """Generate from a prompt of two tokens: runs pre-decoding if the policy has it, and a step."""
    import torch

    import specache

    ids = torch.tensor([[0, 1 + index] for index in range(count)], device=model.device)
    with specache.SpeCache(model, config) as cache:
        specache.generate(
            model,
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=0,
        )
