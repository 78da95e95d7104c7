"""Seeded models, their answers, and whether two answers are the same."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import specache
from specache.bench.gpu_check.checks import Check
from specache.bench.shapes import Shape
from specache.config import SpeCacheConfig

SPREAD = 1.44  # of queries and keys, so that attention and logits are spread and a wrong cache shows
NEAR_TIE = 1e-3  # of the largest logit: two best logits so close may be ordered differently by rounding
AMPLIFIED = 2  # times the logits' own difference: the same, where rounding has grown over many tokens


def seeded_model(shape: Shape, dtype: torch.dtype = torch.float32, spread: float | None = SPREAD) -> Any:
    """Return a model of a shape on the CPU, with seeded random weights.

    Args:
        spread: standard deviation of queries and keys; `None` for transformers' own, about flat.
    """
    config = shape.config()
    if spread is not None:
        config.initializer_range = spread / math.sqrt(shape.hidden_size)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(dtype)


def ragged_prompts(lengths: tuple[int, ...], vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a left-padded batch of random prompts and its mask, int64 [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, max(lengths) - length :] = torch.randint(2, vocabulary, (length,), generator=generator)
        mask[row, max(lengths) - length :] = 1
    return ids, mask


def answer(model: Any, ids: Tensor, mask: Tensor, config: SpeCacheConfig, new: int, **arguments: Any) -> Any:
    """Return greedy tokens and logits."""
    fixed = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    device = next(model.parameters()).device
    return specache.generate(model, ids.to(device), attention_mask=mask.to(device), config=config, **fixed, **arguments)


def require_same(check: Check, found: Any, expected: Any, width: int, least: int) -> None:
    """Require the tokens of two answers to be the same, up to ties that rounding decides.

    A row is compared up to the first token that differs. There the expected answer's two best
    logits must be near one another, and `least` tokens must have been the same. The check's details
    get `logit_error`, and `first_error`, that of the first two tokens: a random model amplifies
    rounding from token to token.
    """
    ours, theirs = (one.sequences[:, width:].cpu() for one in (found, expected))
    check.require(ours.shape == theirs.shape, f"answers have shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
    logits = torch.stack([one.float().cpu() for one in expected.logits])  # [steps, B, V]
    own = torch.stack([one.float().cpu() for one in found.logits])
    check.require(torch.isfinite(own).all(), "logits are not finite")
    compared = 0
    for row in range(len(ours)):
        different = (ours[row] != theirs[row]).nonzero()
        step = int(different[0]) if len(different) else ours.shape[1]
        compared += step
        if step < ours.shape[1]:
            best, largest = logits[step, row].topk(2).values, logits[step, row].abs().max()
            gap = float((best[0] - best[1]) / largest)
            near = max(NEAR_TIE, AMPLIFIED * float((own[step, row] - logits[step, row]).abs().max() / largest))
            said = (
                f"sequence {row} differs at token {step}: {int(ours[row, step])}, expected {int(theirs[row, step])}; gap {gap:.1e}"
            )
            check.require(gap < near and step >= least, said)
            check.details["near_ties"] = check.details.get("near_ties", 0) + 1
        steps = slice(0, min(step + 1, len(logits)))
        error = relative_error(own[steps, row], logits[steps, row])
        check.details["logit_error"] = max(check.details.get("logit_error", 0.0), error)
        first = relative_error(own[:2, row], logits[:2, row])
        check.details["first_error"] = max(check.details.get("first_error", 0.0), first)
    check.details["tokens"] = compared


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())
