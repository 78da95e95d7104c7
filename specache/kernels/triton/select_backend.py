"""Launch the kernels that select the `k` largest probabilities, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from specache.config import TopK
from specache.kernels.triton import launch_options as options
from specache.kernels.triton import select
from specache.kernels.triton.launch_options import power_of_two
from specache.kernels.triton.tables import PageScores

NUMBER, HALF_NUMBER = 31, 16  # bits of a probability that are compared
DIGIT_BITS = 8


def launch_select(scores: PageScores, rest_lse: Tensor, lengths: Tensor, top_k: TopK, block: int) -> Tensor:
    """Select positions int64 [B, Hkv, n, k of S tokens] of the largest mean probabilities.

    Args:
        lengths: int32 [B].
        block: scores per program.
    """
    batch, heads, groups, n, size = scores.values.shape
    k, device = top_k.of(size), scores.values.device
    counted = k, min(top_k.short, size), top_k.long_from
    positions = torch.empty(batch, heads, n, k, dtype=torch.int64, device=device)
    if not positions.numel():
        return positions
    block = min(block, power_of_two(size, 128))
    blocks = -(-size // block)
    number = HALF_NUMBER if scores.is_half else NUMBER
    digits = -(-number // DIGIT_BITS)
    mean_prob = torch.empty(batch, heads, n, size, dtype=torch.int16 if scores.is_half else torch.int32, device=device)
    histogram = torch.zeros(batch, heads, n, digits, 1 << DIGIT_BITS, dtype=torch.int32, device=device)
    counts = torch.empty(2, batch, heads, n, blocks, dtype=torch.int32, device=device)
    grid, settings = (blocks, n, batch * heads), options.select(BLOCK=block)
    rest_lse = rest_lse.float().contiguous()
    if scores.is_half:
        _half_mean_probs(scores, rest_lse, lengths, mean_prob, histogram, grid, block)
    else:
        values = scores.values.contiguous()
        parts = torch.empty(2, batch, heads, groups, n, blocks, dtype=torch.float32, device=device)
        select.peaks_kernel[(batch * heads * groups * n, blocks)](values, *parts, size, **settings)
        select.mean_prob_kernel[grid](
            values,
            rest_lse,
            lengths,
            *parts,
            mean_prob,
            histogram,
            size,
            heads,
            G=groups,
            BLOCKS_P=power_of_two(blocks),
            **settings,
        )
    for digit in range(1, digits):
        select.digit_kernel[grid](mean_prob, lengths, histogram, size, *counted, heads, NUMBER=number, DIGIT=digit, **settings)
    select.count_kernel[grid](mean_prob, lengths, histogram, *counts, size, *counted, heads, NUMBER=number, **settings)
    select.positions_kernel[grid](
        mean_prob,
        lengths,
        histogram,
        *counts,
        positions,
        size,
        *counted,
        heads,
        NUMBER=number,
        BLOCKS_P=power_of_two(blocks),
        **settings,
    )
    return positions


def _half_mean_probs(
    scores: PageScores,
    rest_lse: Tensor,
    lengths: Tensor,
    mean_prob: Tensor,
    histogram: Tensor,
    grid: tuple[int, int, int],
    block: int,
) -> None:
    """Compute the mean probabilities of float16 scores, and count their first digits."""
    batch, heads, groups, n, size = scores.values.shape
    references, lines = scores.peaks, heads * groups * n
    assert references is not None
    assert scores.totals is not None
    token_groups = references.shape[-1]
    group, peaks, totals = size // token_groups, references, scores.totals
    if scores.exact is not None:
        peaks, totals = torch.empty(2, *references.shape, dtype=torch.float32, device=mean_prob.device)
        settings = options.select_parts(group)
        select.parts_kernel[(batch * lines, -(-token_groups // settings["GROUPS"]))](
            scores.values, references, lengths, peaks, totals, size, lines, **settings
        )
    normaliser = torch.empty(batch, heads, groups, n, dtype=torch.float32, device=mean_prob.device)
    select.normaliser_kernel[(batch * lines,)](
        peaks, totals, rest_lse, lengths, normaliser, token_groups, lines, **options.select_normaliser(group)
    )
    select.half_mean_prob_kernel[grid](
        scores.values,
        references,
        normaliser,
        lengths,
        mean_prob,
        histogram,
        size,
        heads,
        **options.select(G=groups, GROUP=group, BLOCK=block),
    )
