"""Every Triton kernel against the plain PyTorch ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specache.config import Code
from specache.kernels.torch import operations as torch_ops
from specache.kernels.triton.backend import TritonKernels, rotate_query
from specache.kernels.triton.tables import offsets_of, page_tables
from specache.low_bit.layout import PageLayout
from specache.low_bit.pool import PagePool, PageTable
from specache.platform.budget import ByteBudget
from tests.kernels.test_native import Case

# Small splits and blocks, so that short sequences take several.
KERNELS = TritonKernels(split=64, select_block=128)
# Two bfloat16 parts of a factor keep 16 bits, for models with 16-bit rows; three keep a float32.
EXACT, SPLIT_IN_TWO = 1e-5, 1e-4


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


def assert_near(found, expected, share, size=None):
    """Within `share` of the largest expected number, or of `size`."""
    finite = expected != -torch.inf
    assert torch.equal(found == -torch.inf, ~finite)
    if finite.any():
        assert (found - expected)[finite].abs().max() <= share * (size or expected[finite].abs().max()) + 1e-7


@settings(max_examples=20, deadline=None)
@given(case=cases(), softcap=st.sampled_from([None, 5.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_scores_equal_pytorchs(case, softcap, dtype):
    query = case.query.to(dtype)
    expected = torch_ops.score(query, case.low_bit_kvs, case.lengths, 0.2, softcap)
    found = KERNELS.score(query, case.low_bit_kvs, case.lengths, 0.2, softcap)
    assert_near(found, expected, EXACT if dtype == torch.float32 else SPLIT_IN_TWO)


@settings(max_examples=12, deadline=None)
@given(case=cases(), k=st.integers(1, 40))
def test_rescore_and_attend_equal_pytorchs(case, k):
    dtype = case.keys[0].dtype
    scores = torch_ops.score(case.query, case.low_bit_kvs, case.lengths, 0.2, None)
    positions = torch_ops.select(scores, case.rest, case.lengths, k)
    positions[:, :, -1, ::3] = -1  # the draft query does without missing rows
    rows = torch.randn(*positions.shape, 2 * case.dim, generator=torch.Generator().manual_seed(k)).to(dtype)
    for softcap, query in ((None, case.query.to(dtype)), (5.0, case.query)):
        expected, found = scores.clone(), scores.clone()
        torch_ops.rescore(query, expected, positions, rows, 0.2, softcap)
        KERNELS.rescore(query, found, positions, rows, 0.2, softcap)
        assert_near(found, expected, EXACT)
    out, lse = KERNELS.attend(expected.clone(), positions, rows, case.low_bit_kvs, case.lengths)
    expected_out, expected_lse = torch_ops.attend(expected, positions, rows, case.low_bit_kvs, case.lengths)
    assert_near(lse, expected_lse, EXACT)
    largest = max(float(values.float().abs().max()) for values in (*case.values, rows) if values.numel())
    assert_near(out, expected_out, EXACT if dtype == torch.float32 else SPLIT_IN_TWO, largest)


def test_attend_without_fetched_pairs_or_without_tokens_equals_pytorchs():
    case = Case(Code.ROTATED, 2, 32, 64, 2, 2, 2, [3, 0], 0, torch.float32)
    scores = torch_ops.score(case.query, case.low_bit_kvs, case.lengths, 0.2, None)
    positions = torch.empty(2, 2, 2, 0, dtype=torch.int64)
    rows = torch.empty(2, 2, 2, 0, 128)
    expected = torch_ops.attend(scores.clone(), positions, rows, case.low_bit_kvs, case.lengths)
    found = KERNELS.attend(scores, positions, rows, case.low_bit_kvs, case.lengths)
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, EXACT)
    out, lse = KERNELS.attend(scores[..., :0].contiguous(), positions, rows, case.low_bit_kvs, [0, 0])
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_fetched_rows_of_all_queries_may_share_memory():
    """Prefetched rows are the same for every row of a pass: `rows` is then expanded, not copied."""
    case = Case(Code.KIVI, 2, 32, 64, 2, 2, 2, [3, 2], 1, torch.bfloat16)
    scores = torch_ops.score(case.query, case.low_bit_kvs, case.lengths, 0.2, None)
    positions = torch_ops.select(scores, case.rest, case.lengths, 5)[:, :, :1].expand(-1, -1, 2, -1)
    rows = torch.randn(2, 2, 1, 5, 128).bfloat16().expand(-1, -1, 2, -1, -1)
    expected, found = scores.clone(), scores.clone()
    torch_ops.rescore(case.query, expected, positions, rows, 0.2, None)
    KERNELS.rescore(case.query, found, positions, rows, 0.2, None)
    assert_near(found, expected, EXACT)
    expected_out, _ = torch_ops.attend(expected, positions, rows, case.low_bit_kvs, case.lengths)
    assert_near(KERNELS.attend(found, positions, rows, case.low_bit_kvs, case.lengths)[0], expected_out, SPLIT_IN_TWO)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=2).filter(any),
    groups=st.integers(1, 4),
    rows=st.integers(1, 2),
    k=st.integers(1, 70),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    unseen=st.booleans(),
)
def test_select_equals_pytorchs(lengths, groups, rows, k, levels, unseen):
    """Also among equal scores: the lower position wins."""
    generator = torch.Generator().manual_seed(k)
    shape = (len(lengths), 1, groups, rows, max(lengths))
    scores = torch.randint(0, levels, shape, generator=generator).float() * (8 / levels)
    rest = torch.randn(shape[:-1], generator=generator)
    if unseen:  # positions that no row sees
        scores[..., ::3] = -torch.inf
    for b, length in enumerate(lengths):
        scores[b, ..., length:] = -torch.inf
    expected = torch_ops.select(scores, rest, lengths, k)
    found = KERNELS.select(scores, rest, lengths, k)
    if levels < 10:
        assert torch.equal(found, expected)
        return
    for b, length in enumerate(lengths):
        count = min(k, length)
        chosen = found[b, ..., :count]
        assert (chosen.diff(dim=-1) > 0).all()
        assert count == 0 or (chosen.min() >= 0 and chosen.max() < length)
        assert (found[b, ..., count:] == -1).all()
    mean_prob = torch_ops.mean_probabilities(scores, rest)
    sizes = [mean_prob.gather(-1, p.clamp(min=0)).where(p >= 0, 0.0).sort(-1).values for p in (found, expected)]
    torch.testing.assert_close(*sizes, rtol=1e-5, atol=0)  # two exponentials order near equals differently


def test_select_reads_a_long_line_of_scores_to_its_end():
    scores = torch.randn(1, 1, 2, 1, 10_001, generator=torch.Generator().manual_seed(0))
    scores[..., 10_000] = 9.0
    rest = torch.zeros(1, 1, 2, 1)
    positions = TritonKernels().select(scores, rest, [10_001], 64)
    assert torch.equal(positions, torch_ops.select(scores, rest, [10_001], 64))
    assert positions[..., -1] == 10_000


def test_a_score_that_is_not_a_number_stays_in_range():
    scores = torch.randn(1, 2, 2, 2, 100)
    scores[:, :, 0] = float("nan")
    positions = KERNELS.select(scores, torch.zeros(1, 2, 2, 2), [90], 16)
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
    positions = torch.randint(-1, 47, (2, heads, 2, k), generator=generator)
    found = KERNELS.gather(stored, positions)
    at = positions.clamp(min=0)
    expected = torch.stack([rows[torch.arange(heads)[:, None, None], at[b]] for b, rows in enumerate(stored)])
    assert torch.equal(found, expected.where((positions >= 0).unsqueeze(-1), 0.0))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_tables_may_be_overwritten_in_place(bits):
    """What a captured graph does: kernels read pages and lengths from device memory, the grid is
    for the capacity.
    """
    case = Case(Code.ROTATED, bits, 32, 64, 2, 2, 2, [2, 5], 0, torch.float32)
    tables = page_tables(case.low_bit_kvs, case.lengths, torch.device("cpu"))
    rotated_query, offsets = rotate_query(case.query, case.low_bit_kvs), offsets_of(case.low_bit_kvs)
    for lengths in ([64, 160], [32, 96], [0, 0]):
        tables.lengths.copy_(torch.tensor(lengths))
        found = KERNELS.score_pages(case.query, rotated_query, tables, offsets, case.low_bit_kvs[0], 200, 0.2, None).values
        expected = torch.full_like(found, -torch.inf)
        scores = torch_ops.score(case.query, case.low_bit_kvs, lengths, 0.2, None)
        expected[..., : scores.shape[-1]] = scores
        assert_near(found, expected, EXACT)
