"""Plain-PyTorch kernels over packed pages against `reference.py` and dense arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specache import reference
from specache.config import Code, TopK
from specache.kernels import dispatch
from specache.kernels.torch import operations as torch_ops
from specache.kernels.types import LowBitKV
from specache.low_bit.key_scales import KeyScales
from specache.low_bit.layout import PageLayout
from specache.low_bit.pool import PagePool, PageTable
from specache.platform.budget import ByteBudget
from tests.pairs import top_ks

CPU = torch.device("cpu")


def filled_table(
    keys: torch.Tensor, values: torch.Tensor, bits: int, group_size: int, steps: list[int], code: Code = Code.KIVI
) -> PageTable:
    """A table over keys, values [Hkv, n, D], quantised in several calls of whole groups."""
    heads, _, dim = keys.shape
    pool = PagePool(PageLayout(code, bits, group_size, heads, dim), CPU, ByteBudget())
    table, start = PageTable(pool), 0
    for step in steps:
        table.extend(step)
        dispatch.quantise(keys[:, start : start + step], values[:, start : start + step], copy_of(table), start)
        start += step
    return table


def copy_of(table: PageTable) -> LowBitKV:
    layout = table.pool.layout
    return table.low_bit_kv(channel_scales(layout.num_kv_heads, layout.head_dim))


def channel_scales(heads: int, dim: int) -> torch.Tensor:
    return torch.linspace(0.3, 3.0, dim).repeat(heads, 1)


@st.composite
def low_bit_kvs(draw):
    bits = draw(st.sampled_from([1, 2, 4]))
    group_size = draw(st.sampled_from([8, 16, 32, 64]))
    dim = draw(st.sampled_from([20, 32, 64, 80, 96, 128, 256]))
    heads = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    groups = draw(st.lists(st.integers(1, 200 // group_size), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    length = sum(groups) * group_size
    keys = (torch.randn(heads, length, dim, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 300.0]))).to(dtype)
    values = torch.randn(heads, length, dim, generator=generator).to(dtype)
    if draw(st.booleans()):
        keys[:, : group_size + 1] = keys[:, :1]  # a constant group, and one that is nearly so
    return keys, values, bits, group_size, [count * group_size for count in groups]


@settings(max_examples=60, deadline=None)
@given(low_bit_kvs())
def test_packed_codes_decode_to_exactly_what_the_reference_gives(case):
    keys, values, bits, group_size, steps = case
    decoded_keys, decoded_values = torch_ops.dequantise(filled_table(keys, values, bits, group_size, steps).low_bit_kv())
    expected_keys = reference.dequantise_keys(*reference.quantise_keys(keys, bits, group_size), group_size)
    expected_values = reference.dequantise_values(*reference.quantise_values(values, bits, group_size), group_size)
    assert torch.equal(decoded_keys, expected_keys)
    assert torch.equal(decoded_values, expected_values)


@settings(max_examples=40, deadline=None)
@given(low_bit_kvs())
def test_rotated_codes_decode_to_what_the_reference_gives(case):
    """The same codes and scales, but where the last bit of a rotated number decides: two ways to
    rotate round differently.
    """
    keys, values, bits, group_size, steps = case
    heads, _, dim = keys.shape
    table = filled_table(keys, values, bits, group_size, steps, Code.ROTATED)
    expected = reference.rotated_low_bit_kv(keys, values, channel_scales(heads, dim), bits, group_size)
    for decoded, other in zip(torch_ops.dequantise(copy_of(table)), expected, strict=True):
        size = other.norm(dim=-1) + 1e-6
        error = (decoded - other).norm(dim=-1) / size  # [Hkv, n]
        assert torch.isfinite(decoded).all()
        assert (error > 2e-3).float().mean() < 0.02  # a code turned: one step of one channel
        assert error.max() < 1.0


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_vector_keeps_its_inner_product_with_its_own_rotated_code(bits):
    torch.manual_seed(bits)
    values = torch.randn(2, 128, 96)
    _, decoded = torch_ops.dequantise(copy_of(filled_table(values, values, bits, 64, [128], Code.ROTATED)))
    torch.testing.assert_close((decoded * values).sum(-1), values.square().sum(-1), rtol=2e-3, atol=0)


def test_key_scales_undo_a_rescaling_of_channels():
    """Outlier channels of keys that small queries make up for cost no precision."""
    torch.manual_seed(0)
    queries, keys = torch.randn(4, 128, 64), torch.randn(2, 128, 64)
    factor = torch.logspace(-1.5, 1.5, 64)
    errors = []
    for q, k in ((queries, keys), (queries / factor, keys * factor)):
        weights = KeyScales(128)
        weights.observe(0, q, 2)
        pool = PagePool(PageLayout(Code.ROTATED, 2, 64, 2, 64), CPU, ByteBudget())
        table = PageTable(pool)
        table.extend(128)
        low_bit_kv = table.low_bit_kv(weights.fix(k))
        dispatch.quantise(k, k, low_bit_kv, 0)
        exact = q.unflatten(0, (2, 2)) @ k.unsqueeze(1).transpose(-1, -2)
        errors.append((torch_ops.score(q[None], [low_bit_kv], [128], 1.0, None)[0] - exact).square().mean().item())
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@settings(max_examples=30, deadline=None)
@given(low_bit_kvs(), st.sampled_from(list(Code)), st.sampled_from([None, 20.0]), st.integers(1, 2), st.integers(1, 4))
def test_torch_score_and_attend_equal_dense_attention_over_the_decoded_copy(case, code, softcap, rows, groups):
    keys, values, bits, group_size, steps = case
    heads, length, dim = keys.shape
    low_bit_kv = copy_of(filled_table(keys / keys.abs().max(), values, bits, group_size, steps, code))
    k, v = torch_ops.dequantise(low_bit_kv)
    query = torch.randn(1, heads * groups, rows, dim, generator=torch.Generator().manual_seed(1))
    expected = torch.einsum("hgnd,htd->hgnt", query[0].unflatten(0, (heads, groups)), k) * 0.3
    if softcap:
        expected = softcap * torch.tanh(expected / softcap)
    scores = torch_ops.score(query, [low_bit_kv], [length], 0.3, softcap)
    assert scores.shape == (1, heads, groups, rows, length)
    torch.testing.assert_close(scores[0], expected, atol=2e-4, rtol=1e-4)

    top_k = min(5, length)
    positions = torch_ops.select(scores, torch.full((1, heads, groups, rows), -3.0), [length], TopK.always(top_k))
    fetched = torch.randn(1, heads, rows, top_k, 2 * dim, generator=torch.Generator().manual_seed(2))
    torch_ops.rescore(query, scores, positions, fetched, 0.3, softcap)
    out, lse = torch_ops.attend(scores, positions, fetched, [low_bit_kv], [length])
    for h in range(heads):
        for n in range(rows):
            mixed_k, mixed_v = k[h].clone(), v[h].clone()
            mixed_k[positions[0, h, n]] = fetched[0, h, n, :, :dim]
            mixed_v[positions[0, h, n]] = fetched[0, h, n, :, dim:]
            score = query[0].unflatten(0, (heads, groups))[h, :, n] @ mixed_k.T * 0.3
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            torch.testing.assert_close(lse[0, h, :, n], score.logsumexp(-1), atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(out[0, h, :, n], score.softmax(-1) @ mixed_v, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_ragged_batch_scores_as_each_sequence_alone(bits, code):
    torch.manual_seed(bits)
    lengths = [256, 64, 0]
    tables = [filled_table(torch.randn(2, n, 32), torch.randn(2, n, 32), bits, 32, [n] if n else [], code) for n in lengths]
    query = torch.randn(3, 4, 2, 32)
    together = torch_ops.score(query, [copy_of(t) for t in tables], lengths, 1.0, None)
    none = torch.full((3, 2, 2, 2, 0), -1)
    for b, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        alone = torch_ops.score(query[b : b + 1], [copy_of(table)], [length], 1.0, None)
        torch.testing.assert_close(together[b : b + 1, ..., :length], alone)
        assert (together[b, ..., length:] == -torch.inf).all()
    positions = torch_ops.select(together, torch.zeros(3, 2, 2, 2), lengths, TopK.always(70))
    assert positions.shape == (3, 2, 2, 70)
    for b, length in enumerate(lengths):
        chosen = positions[b][positions[b] >= 0]
        assert len(chosen) == 4 * min(70, length)
        assert chosen.numel() == 0 or chosen.max() < length
    out, lse = torch_ops.attend(together, none[:, :, 0], torch.zeros(3, 2, 2, 0, 64), [copy_of(t) for t in tables], lengths)
    assert torch.isfinite(out).all()
    assert (lse[2] == -torch.inf).all()


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 200), min_size=1, max_size=4), top_k=top_ks(least=0, longest=200), levels=st.integers(1, 6))
def test_each_sequence_of_a_batch_selects_as_it_does_alone(lengths, top_k, levels):
    """Also where some of the sequences are long ones, which select more pairs."""
    generator = torch.Generator().manual_seed(sum(lengths))
    scores = torch.randint(0, levels, (len(lengths), 2, 1, 2, max(lengths)), generator=generator).float()
    for b, length in enumerate(lengths):
        scores[b, ..., length:] = -torch.inf
    rest = torch.zeros(len(lengths), 2, 1, 2)
    together = torch_ops.select(scores, rest, lengths, top_k)
    for b, length in enumerate(lengths):
        k = min(top_k.short if length < top_k.long_from else top_k.long, length)
        alone = torch_ops.select(scores[b : b + 1, ..., :length], rest[b : b + 1], [length], TopK.always(k))
        assert torch.equal(together[b, ..., :k], alone[0])
        assert (together[b, ..., k:] == -1).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 3), st.integers(0, 10**6), st.integers(1, 6))
def test_select_is_a_stable_sort_by_mean_probability(length, k, groups, seed, levels):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (1, 2, groups, 2, length), generator=generator).float()
    rest = torch.zeros(1, 2, groups, 2)
    positions = torch_ops.select(scores, rest, [length], TopK.always(k))
    probabilities = (scores - torch.logaddexp(scores.logsumexp(-1), rest).unsqueeze(-1)).exp().mean(2)
    rounded = (probabilities * 2**20).round()  # ties of equal scores are ties of equal sums
    for h in range(2):
        for n in range(2):
            order = sorted(range(length), key=lambda t: (-rounded[0, h, n, t].item(), t))
            chosen = positions[0, h, n].tolist()
            assert chosen == sorted(set(chosen))
            if groups == 1:
                assert chosen == sorted(order[: min(k, length)])
            else:  # sums of several heads may differ in the last bit
                kept = sorted(rounded[0, h, n, t].item() for t in chosen)
                assert kept == sorted(rounded[0, h, n, t].item() for t in order[: min(k, length)])


def test_fork_shares_pages_and_a_write_to_a_shared_page_copies_it():
    keys, values = torch.randn(1, 160, 32), torch.randn(1, 160, 32)
    table = filled_table(keys[:, :96], values[:, :96], 2, 32, [96])
    before = torch_ops.dequantise(table.low_bit_kv())[0].clone()
    fork = table.fork()
    assert table.pool.pages_in_use == 2
    fork.extend(32)
    dispatch.quantise(keys[:, 96:128], values[:, 96:128], fork.low_bit_kv(), 96)
    assert table.pool.pages_in_use == 3
    assert torch.equal(torch_ops.dequantise(table.low_bit_kv())[0], before)
    assert torch.equal(torch_ops.dequantise(fork.low_bit_kv())[0][:, :96], before)
    fork.truncate(0)
    table.truncate(0)
    assert table.pool.pages_in_use == 0


def test_the_layout_has_the_size_that_the_design_promises():
    for bits, group_size in ((1, 32), (1, 64), (2, 32), (2, 64), (4, 64)):
        layout = PageLayout(Code.KIVI, bits, group_size, 4, 128)
        assert layout.page_bytes == 2 * 64 * 4 * 128 * (bits + 32 / group_size) / 8
        rotated = PageLayout(Code.ROTATED, bits, group_size, 4, 128)
        assert rotated.page_bytes == 64 * 4 * 128 * (2 * (bits + 16 / 128) + 16 / group_size) / 8
