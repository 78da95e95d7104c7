"""Every Triton kernel against the plain PyTorch ones. Scores are those of a float32 model; those of
a 16-bit model are in `test_half_scores.py`.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specache.config import Code, TopK
from specache.kernels.torch import operations as torch_ops
from specache.kernels.triton.backend import TritonKernels
from specache.kernels.triton.tables import PageScores, PageTables
from specache.low_bit.layout import PageLayout
from specache.low_bit.pool import PagePool, PageTable
from specache.platform.budget import ByteBudget
from tests.kernels.paged import PagedCase, assert_near, assert_selected
from tests.kernels.test_native import Case
from tests.pairs import top_ks

# Small splits and blocks, so that short sequences take several.
KERNELS = TritonKernels(split=64, select_block=128)
EXACT = 1e-5  # three bfloat16 parts of a factor keep a float32


@st.composite
def cases(draw, longest=130, most_groups=9):
    group_size = draw(st.sampled_from([16, 32, 64]))
    return Case(
        code=draw(st.sampled_from(list(Code))),
        bits=draw(st.sampled_from([1, 2, 4])),
        group_size=group_size,
        dim=draw(st.sampled_from([20, 32, 64, 80, 96, 128, 256])),
        heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, most_groups)),
        rows=draw(st.integers(1, 2)),
        counts=draw(st.lists(st.integers(0, longest // group_size), min_size=1, max_size=2).filter(any)),
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )


@settings(max_examples=12, deadline=None)
@given(case=cases(), softcap=st.sampled_from([None, 5.0]))
def test_scores_equal_pytorchs(case, softcap):
    paged = PagedCase(case, torch.float32)
    assert_near(paged.score(KERNELS, softcap).values, paged.torch_scores(softcap), EXACT)


@settings(max_examples=10, deadline=None)
@given(case=cases(), k=st.integers(1, 40))
def test_rescore_and_attend_equal_pytorchs(case, k):
    paged = PagedCase(case, torch.float32)
    scores = paged.torch_scores(None)
    positions = paged.positions(scores, k)
    rows = paged.kv_rows(positions, k)
    for softcap in (None, 5.0):
        expected, found = scores.clone(), PageScores(scores.clone())
        torch_ops.rescore(paged.query, expected, positions, rows, 0.2, softcap)
        KERNELS.rescore_pages(paged.query, found, positions, rows, 0.2, softcap)
        assert_near(found.values, expected, EXACT)
    out, lse = paged.attend(KERNELS, PageScores(expected.clone()), positions, rows)
    expected_out, expected_lse = paged.torch_attend(expected, positions, rows)
    assert_near(lse, expected_lse, EXACT)
    assert_near(out, expected_out, EXACT, paged.largest(rows))


def test_attend_without_fetched_pairs_or_without_tokens_equals_pytorchs():
    case = Case(Code.ROTATED, 2, 32, 64, 2, 2, 2, [3, 0], 0, torch.float32)
    paged = PagedCase(case, torch.float32)
    positions = torch.empty(2, 2, 2, 0, dtype=torch.int64)
    rows = torch.empty(2, 2, 2, 0, 128)
    scores = paged.torch_scores(None)
    expected = paged.torch_attend(scores, positions, rows)
    for ours, theirs in zip(paged.attend(KERNELS, PageScores(scores), positions, rows), expected, strict=True):
        assert_near(ours, theirs, EXACT)
    paged.tables = PageTables(paged.tables.addresses[:, :0], torch.zeros(2, dtype=torch.int32))
    none = paged.score(KERNELS, None)
    assert none.values.shape[-1] == 0
    out, lse = paged.attend(KERNELS, none, positions, rows)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=2).filter(any),
    groups=st.integers(1, 4),
    rows=st.integers(1, 2),
    top_k=top_ks(),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    unseen=st.booleans(),
)
def test_select_equals_pytorchs(lengths, groups, rows, top_k, levels, unseen):
    """Also among equal scores: the lower position wins."""
    generator = torch.Generator().manual_seed(top_k.short)
    shape = (len(lengths), 1, groups, rows, max(lengths))
    scores = torch.randint(0, levels, shape, generator=generator).float() * (8 / levels)
    rest = torch.randn(shape[:-1], generator=generator)
    if unseen:  # positions that no row sees
        scores[..., ::3] = -torch.inf
    for b, length in enumerate(lengths):
        scores[b, ..., length:] = -torch.inf
    expected = torch_ops.select(scores, rest, lengths, top_k)
    found = KERNELS.select_pages(PageScores(scores), rest, torch.tensor(lengths, dtype=torch.int32), top_k)
    if levels < 10:
        assert torch.equal(found, expected)
        return
    assert_selected(found, scores, rest, lengths, top_k, rtol=1e-5, atol=0)  # two exponentials order near equals differently


def test_select_reads_a_long_line_of_scores_to_its_end():
    scores = torch.randn(1, 1, 2, 1, 10_001, generator=torch.Generator().manual_seed(0))
    scores[..., 10_000] = 9.0
    rest = torch.zeros(1, 1, 2, 1)
    positions = TritonKernels().select_pages(PageScores(scores), rest, torch.tensor([10_001], dtype=torch.int32), TopK.always(64))
    assert torch.equal(positions, torch_ops.select(scores, rest, [10_001], TopK.always(64)))
    assert positions[..., -1] == 10_000


def test_a_score_that_is_not_a_number_stays_in_range():
    scores = torch.randn(1, 2, 2, 2, 100)
    scores[:, :, 0] = float("nan")
    lengths = torch.tensor([90], dtype=torch.int32)
    positions = KERNELS.select_pages(PageScores(scores), torch.zeros(1, 2, 2, 2), lengths, TopK.always(16))
    assert ((positions >= 0) & (positions < 90)).all()


def quantised(case, keys, values, step):
    """What Triton's codes decode to, quantised in one or two calls."""
    layout = PageLayout(case.code, case.bits, case.group_size, case.heads, case.dim)
    table = PageTable(PagePool(layout, torch.device("cpu"), ByteBudget()))
    cut = round(step * (keys.shape[1] // case.group_size)) * case.group_size
    for start, stop in ((0, cut), (cut, keys.shape[1])):
        if stop > start:
            table.extend(stop - start)
            KERNELS.quantise(keys[:, start:stop], values[:, start:stop], case.low_bit_kv(table), start)
    return torch_ops.dequantise(case.low_bit_kv(table))


@settings(max_examples=16, deadline=None)
@given(case=cases(longest=200, most_groups=1), step=st.floats(0, 1), constant=st.booleans())
def test_codes_equal_pytorchs(case, step, constant):
    """KIVI's to the bit. A rotation adds up in another order: there a code may differ where the
    last bit decides.
    """
    if constant:
        for keys in case.keys:
            keys[:, : case.group_size] = keys[:, :1]
    case.tables = [case.filled(k, v) for k, v in zip(case.keys, case.values, strict=True)]
    for keys, values, table in zip(case.keys, case.values, case.tables, strict=True):
        if not keys.shape[1]:
            continue
        found = quantised(case, keys, values, step)
        for ours, theirs in zip(found, torch_ops.dequantise(case.low_bit_kv(table)), strict=True):
            if case.code is Code.KIVI:
                assert torch.equal(ours, theirs)
            else:
                differs = ((ours - theirs).abs() > 1e-3 * theirs.abs().max()).any(-1)  # of a token
                assert differs.float().mean() <= max(0.02, 1.5 / differs.numel())


@settings(max_examples=10, deadline=None)
@given(
    heads=st.integers(1, 2),
    k=st.integers(1, 20),
    dim=st.sampled_from([20, 64, 80]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_gather_reads_the_rows_where_they_lie(heads, k, dim, dtype):
    generator = torch.Generator().manual_seed(k)
    stored = [torch.randn(heads, 50, 2 * dim, generator=generator).to(dtype)[:, 3:] for _ in range(2)]
    positions = torch.randint(-1, 47, (2, heads, k), generator=generator)
    found = KERNELS.gather_at(torch.tensor([rows.data_ptr() for rows in stored]), stored[0], positions)
    at = positions.clamp(min=0)
    expected = torch.stack([rows[torch.arange(heads)[:, None], at[b]] for b, rows in enumerate(stored)])
    assert torch.equal(found, expected.where((positions >= 0).unsqueeze(-1), 0.0))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_tables_may_be_overwritten_in_place(bits):
    """What a captured graph does: kernels read pages and lengths from device memory, the grid is
    for the capacity.
    """
    case = Case(Code.ROTATED, bits, 32, 64, 2, 2, 2, [2, 5], 0, torch.float32)
    paged = PagedCase(case, torch.float32)
    for lengths in ([64, 160], [32, 96], [0, 0]):
        paged.tables.lengths.copy_(torch.tensor(lengths))
        expected = torch_ops.score(paged.query, case.low_bit_kvs, lengths, 0.2, None)
        expected = torch.nn.functional.pad(expected, (0, paged.tables.capacity - max(lengths)), value=-torch.inf)
        assert_near(paged.score(KERNELS, None).values, expected, EXACT)
    paged.tables.lengths.copy_(torch.tensor([64, 64]))
    paged.tables.addresses[0] = paged.tables.addresses[1]
    paged.query[0] = paged.query[1]
    first, second = paged.score(KERNELS, None).values
    assert torch.equal(first, second)
