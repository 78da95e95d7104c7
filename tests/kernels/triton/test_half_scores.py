"""Scores of a 16-bit model, kept in float16 relative to their group's largest: what that costs, and
what it does not touch.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specache.config import Code, TopK
from specache.device import batch
from specache.device.page_kernels import TorchPages
from specache.kernels import dispatch
from specache.kernels.torch import operations as torch_ops
from specache.kernels.triton.backend import TritonKernels
from specache.kernels.triton.tables import PageScores
from tests.cache.test_invariants import run
from tests.cache.test_invariants import settings as decode_settings
from tests.device.static_running import static_steps
from tests.kernels.paged import OUT_ERROR, PagedCase, absolute_scores, assert_near, assert_rounded, assert_selected
from tests.kernels.test_native import Case
from tests.kernels.triton.test_interpreted import cases
from tests.pairs import top_ks
from tests.tiny import llama, prompt

KERNELS = TritonKernels(split=64, select_block=128)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16])


@settings(max_examples=6, deadline=None)
@given(case=cases(), dtype=DTYPES, softcap=st.sampled_from([None, 5.0]), top_k=top_ks(most=40))
def test_float16_scores_and_selections_are_near_float32s(case, dtype, softcap, top_k):
    paged = PagedCase(case, dtype)
    scores, expected = paged.score(KERNELS, softcap), paged.torch_scores(softcap)
    assert_rounded(scores, paged.tables.lengths, expected)
    assert_selected(KERNELS.select_pages(scores, case.rest, paged.tables.lengths, top_k), expected, case.rest, case.lengths, top_k)


@settings(max_examples=6, deadline=None)
@given(case=cases(), dtype=DTYPES, top_k=top_ks(most=40))
def test_fetched_pairs_stay_exact_and_the_rest_is_near(case, dtype, top_k):
    paged = PagedCase(case, dtype)
    scores, expected = paged.score(KERNELS, None), paged.torch_scores(None)
    positions = paged.positions(expected, top_k.short)
    rows = paged.kv_rows(positions, top_k.short)
    torch_ops.rescore(paged.query, expected, positions, rows, 0.2, None)
    KERNELS.rescore_pages(paged.query, scores, positions, rows, 0.2, None)
    exact = torch_ops.exact_scores(paged.query, expected, rows, 0.2, None)
    real = (positions >= 0).unsqueeze(2).expand_as(exact)
    torch.testing.assert_close(scores.exact[real], exact[real], atol=1e-5, rtol=1e-5)
    # a policy that uses what it prefetched selects among the exact scores
    assert_selected(KERNELS.select_pages(scores, case.rest, paged.tables.lengths, top_k), expected, case.rest, case.lengths, top_k)
    out, lse = paged.attend(KERNELS, scores, positions, rows)
    expected_out, expected_lse = paged.torch_attend(expected, positions, rows)
    assert_near(lse, expected_lse, 1e-3)
    assert_near(out, expected_out, OUT_ERROR, paged.largest(rows))


def test_fetched_rows_of_all_queries_may_share_memory():
    """Prefetched rows are the same for every query of a step: they are expanded, not copied."""
    paged = PagedCase(Case(Code.KIVI, 2, 32, 64, 2, 2, 2, [3, 2], 1, torch.bfloat16), torch.bfloat16)
    selected = torch_ops.select(paged.torch_scores(None), paged.rest, paged.lengths, TopK.always(5))
    positions = selected[:, :, :1].expand(-1, -1, 2, -1)
    expanded = torch.randn(2, 2, 1, 5, 128).bfloat16().expand(-1, -1, 2, -1, -1)
    found = []
    for rows in (expanded, expanded.contiguous()):
        scores = paged.score(KERNELS, None)
        KERNELS.rescore_pages(paged.query, scores, positions, rows, 0.2, 5.0)
        values = absolute_scores(scores, paged.tables.lengths)
        found.append([values, scores.exact, *paged.attend(KERNELS, scores, positions, rows)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 256), min_size=1, max_size=2).filter(any),
    groups=st.integers(1, 4),
    rows=st.integers(1, 2),
    top_k=top_ks(),
    levels=st.sampled_from([1, 2, 4]),
    group=st.sampled_from([16, 32, 64]),
)
def test_the_lower_of_equal_positions_wins(lengths, groups, rows, top_k, levels, group):
    """Scores that all query heads share and float16 holds exactly: their means are equal or far
    apart.
    """
    generator = torch.Generator().manual_seed(top_k.short)
    shape = (len(lengths), 1, groups, rows, 256)
    absolute = torch.randint(0, levels, (len(lengths), 1, 1, rows, 256), generator=generator).expand(shape) * (8 / levels)
    rest = torch.randn(shape[:-1], generator=generator)
    for b, length in enumerate(lengths):
        absolute[b, ..., length:] = -torch.inf
    grouped = absolute.unflatten(-1, (-1, group))
    peaks = grouped.amax(-1).clamp(min=-1e30)
    relative = grouped - peaks.unsqueeze(-1)
    scores = PageScores(relative.flatten(-2).half(), peaks, relative.exp().sum(-1))
    found = KERNELS.select_pages(scores, rest, torch.tensor(lengths, dtype=torch.int32), top_k)
    assert torch.equal(found, torch_ops.select(absolute, rest, lengths, top_k))


def test_a_score_that_is_not_a_number_stays_in_range():
    values = torch.randn(1, 2, 2, 2, 128).half()
    values[:, :, 0] = float("nan")
    parts = torch.zeros(2, 1, 2, 2, 2, 4)
    lengths = torch.tensor([90], dtype=torch.int32)
    positions = KERNELS.select_pages(PageScores(values, *parts), torch.zeros(1, 2, 2, 2), lengths, TopK.always(16))
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
    positions = TritonKernels().select_pages(scores, rest, torch.tensor([size], dtype=torch.int32), TopK.always(64))
    assert_selected(positions, absolute, rest, [size], TopK.always(64))
    assert positions[..., -1] == size - 1


@pytest.mark.parametrize("policy", ["verified", "previous"])
def test_a_decode_of_a_16_bit_model_is_near_pytorchs(monkeypatch, policy):
    """Static buffers; a group is quantised on the way. PyTorch's kernels use float32 scores."""
    model = llama(num_hidden_layers=1).to(torch.bfloat16)
    config = decode_settings(code="rotated", bits=2, residual=7, policy=policy, slow_tier="ram", prefill_chunk=4096)
    with dispatch.using("triton"), static_steps(monkeypatch, capacity_step=64) as steps:
        tokens, logits, _ = run(model, prompt(53), config, new=4)
        monkeypatch.setattr(batch, "page_kernels", lambda layout, device: TorchPages(layout))
        _, expected, _ = run(model, prompt(53), config, new=4, answer=tokens)
    assert steps == [1] * 6
    assert (logits - expected).abs().max() <= 2.0**-6 * expected.abs().max()  # bfloat16 logits: a few last bits
