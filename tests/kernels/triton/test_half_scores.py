"""Scores of a 16-bit model, kept in float16 relative to their group's largest: what that costs, and
what it does not touch.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specache.device import batch
from specache.device.page_kernels import TorchPages
from specache.kernels import dispatch
from specache.kernels.torch import operations as torch_ops
from specache.kernels.triton.backend import TritonKernels, rotate_query
from specache.kernels.triton.tables import PageScores, offsets_of, page_tables
from tests.cache.test_invariants import run
from tests.cache.test_invariants import settings as decode_settings
from tests.device.static_running import static_steps
from tests.kernels.test_native import Case
from tests.kernels.triton.test_interpreted import assert_near, cases
from tests.tiny import llama, prompt

KERNELS = TritonKernels(split=64, select_block=128)
HALF = 2.0**-11  # what float16 rounds off of a number
CPU = torch.device("cpu")


class HalfCase:
    """A batch's copy as a static step sees it: tables, and room for more tokens than there are."""

    def __init__(self, case: Case) -> None:
        self.case, self.lengths = case, torch.tensor(case.lengths, dtype=torch.int32)
        self.capacity = 64 * (-(-max(case.lengths) // 64) + 1)
        self.tables, self.offsets = page_tables(case.low_bit_kvs, case.lengths, CPU), offsets_of(case.low_bit_kvs)
        self.query = case.query.to(torch.bfloat16)
        rotated = self.case.low_bit_kvs[0].channel_scales is not None
        rotated_query = rotate_query(self.query, case.low_bit_kvs) if rotated else None
        self.scores = KERNELS.score_pages(
            self.query, rotated_query, self.tables, self.offsets, case.low_bit_kvs[0], self.capacity, 0.2, None, half=True
        )
        for b, length in enumerate(case.lengths):  # nothing that is behind may be looked at
            self.scores.values[b, ..., length:] = torch.nan
        self.expected = self._padded(torch_ops.score(self.query, case.low_bit_kvs, case.lengths, 0.2, None))

    def absolute(self) -> Tensor:
        return torch.cat([_row(self.scores, i).last_row(self.lengths) for i in range(self.case.rows)], dim=3)

    def positions(self, k: int) -> Tensor:
        positions = torch_ops.select(self.expected, self.case.rest, self.case.lengths, k)
        positions[:, :, -1, ::3] = -1  # the draft query does without missing rows
        return positions

    def _padded(self, scores: Tensor) -> Tensor:
        room = scores.new_full((*scores.shape[:-1], self.capacity), -torch.inf)
        room[..., : scores.shape[-1]] = scores
        return room


def _row(scores: PageScores, i: int) -> PageScores:
    return PageScores(scores.values[:, :, :, i : i + 1], scores.peaks[:, :, :, i : i + 1])


def assert_chosen(found: Tensor, scores: Tensor, rest: Tensor, lengths: list[int], k: int) -> None:
    """Ascending, in range, and as large as the true ones, but for what rounding may exchange."""
    expected = torch_ops.select(scores, rest, lengths, k)
    assert torch.equal(found >= 0, expected >= 0)
    for b, length in enumerate(lengths):
        chosen = found[b, ..., : min(k, length)]
        assert (chosen.diff(dim=-1) > 0).all()
        assert chosen.numel() == 0 or (chosen.min() >= 0 and chosen.max() < length)
    mean_prob = torch_ops.mean_probabilities(scores, rest)
    sizes = [mean_prob.gather(-1, p.clamp(min=0)).where(p >= 0, 0.0).sort(-1).values for p in (found, expected)]
    torch.testing.assert_close(*sizes, rtol=2e-2, atol=1e-9)  # 8 bits behind the exponent, and scores of 11


@settings(max_examples=12, deadline=None)
@given(case=cases(), k=st.integers(1, 40))
def test_float16_scores_and_selections_are_near_float32s(case, k):
    half = HalfCase(case)
    found, expected = half.absolute(), half.expected
    seen = expected > -torch.inf
    assert torch.equal(found > -torch.inf, seen)
    groups = expected.unflatten(-1, (half.scores.peaks.shape[-1], -1))
    below = (groups.amax(-1, keepdim=True) - groups).flatten(-2)  # of the group's largest
    allowed = HALF * below + 1e-4 * expected[seen].abs().max() + 1e-6
    assert ((found - expected).abs() <= allowed)[seen].all()
    assert_chosen(KERNELS.select_pages(half.scores, case.rest, half.lengths, k), expected, case.rest, case.lengths, k)


@settings(max_examples=12, deadline=None)
@given(case=cases(), k=st.integers(1, 40))
def test_fetched_pairs_stay_exact_and_the_rest_is_near(case, k):
    half, dtype = HalfCase(case), case.keys[0].dtype
    positions = half.positions(k)
    rows = torch.randn(*positions.shape, 2 * case.dim, generator=torch.Generator().manual_seed(k)).to(dtype)
    query = half.query if dtype == torch.bfloat16 else case.query
    expected = half.expected.clone()
    torch_ops.rescore(query, expected, positions, rows, 0.2, None)
    KERNELS.rescore_pages(query, half.scores, positions, rows, 0.2, None)
    exact = torch_ops.exact_scores(query, expected, rows, 0.2, None)
    real = (positions >= 0).unsqueeze(2).expand_as(exact)
    torch.testing.assert_close(half.scores.exact[real], exact[real], atol=1e-5, rtol=1e-5)
    # a policy that uses what it prefetched selects among the exact scores
    selected = KERNELS.select_pages(half.scores, case.rest, half.lengths, k)
    assert_chosen(selected, expected, case.rest, case.lengths, k)
    out, lse = KERNELS.attend_pages(half.scores, positions, rows, half.tables, half.offsets, case.low_bit_kvs[0])
    expected_out, expected_lse = torch_ops.attend(
        expected[..., : max(case.lengths)].contiguous(), positions, rows, case.low_bit_kvs, case.lengths
    )
    assert_near(lse, expected_lse, 1e-3)
    largest = max(float(values.float().abs().max()) for values in (*case.values, rows) if values.numel())
    assert_near(out, expected_out, 2.0**-8, largest)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 256), min_size=1, max_size=2).filter(any),
    groups=st.integers(1, 4),
    rows=st.integers(1, 2),
    k=st.integers(1, 70),
    levels=st.sampled_from([1, 2, 5]),
    group=st.sampled_from([16, 32, 64]),
)
def test_the_lower_of_equal_positions_wins(lengths, groups, rows, k, levels, group):
    """Scores that all query heads share, so that their means are equal or far apart."""
    generator = torch.Generator().manual_seed(k)
    shape = (len(lengths), 1, groups, rows, 256)
    absolute = torch.randint(0, levels, (len(lengths), 1, 1, rows, 256), generator=generator).expand(shape) * (8 / levels)
    rest = torch.randn(shape[:-1], generator=generator)
    for b, length in enumerate(lengths):
        absolute[b, ..., length:] = -torch.inf
    grouped = absolute.unflatten(-1, (-1, group))
    peaks = grouped.amax(-1).clamp(min=-1e30)
    relative = grouped - peaks.unsqueeze(-1)
    scores = PageScores(relative.flatten(-2).half(), peaks, relative.exp().sum(-1))
    found = KERNELS.select_pages(scores, rest, torch.tensor(lengths, dtype=torch.int32), k)
    assert torch.equal(found, torch_ops.select(absolute, rest, lengths, k))


def test_a_score_that_is_not_a_number_stays_in_range():
    values = torch.randn(1, 2, 2, 2, 128).half()
    values[:, :, 0] = float("nan")
    parts = torch.zeros(2, 1, 2, 2, 2, 4)
    lengths = torch.tensor([90], dtype=torch.int32)
    positions = KERNELS.select_pages(PageScores(values, *parts), torch.zeros(1, 2, 2, 2), lengths, 16)
    assert ((positions >= 0) & (positions < 90)).all()


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_long_line_of_scores_is_read_to_its_end(blocks):
    size = 4096 * blocks
    absolute = torch.randn(1, 1, 2, 1, size, generator=torch.Generator().manual_seed(0))
    absolute[..., size - 1] = 9.0
    relative = absolute.unflatten(-1, (-1, 64))
    peaks = relative.amax(-1)
    relative = relative - peaks.unsqueeze(-1)
    scores = PageScores(relative.flatten(-2).half(), peaks, relative.exp().sum(-1))
    rest = torch.zeros(1, 1, 2, 1)
    positions = TritonKernels().select_pages(scores, rest, torch.tensor([size], dtype=torch.int32), 64)
    assert_chosen(positions, absolute, rest, [size], 64)
    assert positions[..., -1] == size - 1


@pytest.mark.parametrize("policy", ["verified", "previous"])
def test_a_decode_of_a_16_bit_model_is_near_pytorchs(monkeypatch, policy):
    """Static buffers; a group is quantised on the way. PyTorch's kernels use float32 scores."""
    model = llama(num_hidden_layers=1).to(torch.bfloat16)
    config = decode_settings(code="rotated", bits=2, residual=7, policy=policy, slow_tier="ram", prefill_chunk=4096)
    with dispatch.using("triton"), static_steps(monkeypatch, capacity_step=64) as steps:
        tokens, logits, _ = run(model, prompt(53), config, new=4)
        monkeypatch.setattr(batch, "page_kernels", lambda layout, capacity, device: TorchPages(layout, capacity))
        _, expected, _ = run(model, prompt(53), config, new=4, answer=tokens)
    assert steps == [1] * 6
    assert (logits - expected).abs().max() <= 2.0**-6 * expected.abs().max()  # bfloat16 logits: a few last bits
