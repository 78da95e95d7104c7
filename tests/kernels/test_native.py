"""Every backend for the CPU against plain PyTorch: the C++ kernels' instruction sets."""

from __future__ import annotations

import math
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specache.cli.main import app
from specache.config import Code, TopK
from specache.errors import ConfigError, NonFiniteError
from specache.kernels import dispatch
from specache.kernels.cpu import native
from specache.kernels.torch import exact
from specache.kernels.torch import operations as torch_ops
from specache.kernels.torch import rotated as torch_rotated
from specache.kernels.torch.layer_step import TorchLayerStep
from specache.kernels.types import AttentionParams, RecentTokens
from specache.linear import native_products
from specache.low_bit.layout import PageLayout
from specache.low_bit.pool import PagePool, PageTable
from specache.platform.budget import ByteBudget
from specache.tiers.ram import RamTier
from specache.tiers.row_memory import RowMemory
from tests.pairs import top_ks

ISAS = dispatch.available()[1:]  # every backend but PyTorch, which they are tested against
CODES = (Code.KIVI, Code.ROTATED)  # those that the C++ kernels have
pytestmark = pytest.mark.skipif(not ISAS, reason=f"the C++ kernels are not built: {native.IMPORT_ERROR}")

# Rounding a page's weights to 8 bits, as a share of the largest value.
VALUE_ERROR = 0.015
SCALING = 0.2


class Case:
    """A ragged batch: sequences with keys and values, and a copy of each made by the PyTorch
    kernels.
    """

    def __init__(self, code, bits, group_size, dim, heads, groups, rows, counts, seed, dtype):
        generator = torch.Generator().manual_seed(seed)
        self.code, self.bits, self.group_size, self.dim, self.heads = code, bits, group_size, dim, heads
        self.rows = rows
        self.lengths = [count * group_size for count in counts]
        self.weights = torch.rand(heads, dim, generator=generator) + 0.5
        self.keys, self.values = [], []
        for length in self.lengths:
            channel = torch.rand(dim, generator=generator) + 0.5
            self.keys.append((torch.randn(heads, length, dim, generator=generator) * channel).to(dtype))
            self.values.append(torch.randn(heads, length, dim, generator=generator).to(dtype))
        self.query = torch.randn(len(counts), heads * groups, rows, dim, generator=generator)
        self.rest = torch.randn(len(counts), heads, groups, rows, generator=generator)
        with dispatch.using("torch"):
            self.tables = [self.filled(k, v) for k, v in zip(self.keys, self.values, strict=True)]
        self.low_bit_kvs = [self.low_bit_kv(table) for table in self.tables]

    def filled(self, keys, values, steps=(1.0,)):
        layout = PageLayout(self.code, self.bits, self.group_size, self.heads, self.dim)
        table = PageTable(PagePool(layout, torch.device("cpu"), ByteBudget()))
        groups = keys.shape[1] // self.group_size
        cuts = sorted({round(groups * step) for step in steps} | {groups})
        start = 0
        for cut in cuts:
            stop = cut * self.group_size
            if stop > start:
                table.extend(stop - start)
                dispatch.quantise(keys[:, start:stop], values[:, start:stop], self.low_bit_kv(table), start)
            start = stop
        return table

    def low_bit_kv(self, table):
        return table.low_bit_kv(self.weights if self.code is Code.ROTATED else None)


@st.composite
def cases(draw):
    group_size = draw(st.sampled_from([1, 8, 16, 32, 64]))
    longest = max(1, 200 // group_size)
    return Case(
        code=draw(st.sampled_from(CODES)),
        bits=draw(st.sampled_from([1, 2, 4])),
        group_size=group_size,
        dim=draw(st.sampled_from([20, 32, 64, 80, 96, 128, 256])),
        heads=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 7)),
        rows=draw(st.integers(1, 2)),
        counts=draw(st.lists(st.integers(0, longest), min_size=1, max_size=3).filter(any)),
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )


every_isa = pytest.mark.parametrize("isa", ISAS)


def rounding_bound(case):
    """The most that rounding the query can change a product with a key: half a step in every
    channel.
    """
    largest = case.query.abs().max()
    if (
        case.code is Code.KIVI
    ):  # 16 bits in two parts: half a step is the largest over 2 * 127 * 254, and codes span at most the keys
        keys = max(keys.float().abs().max() for keys in case.keys if keys.numel())
        return case.dim * largest * keys / (254 * 254)
    turn, bound = torch_rotated.rotation(case.dim, torch.device("cpu")), 0.0
    for low_bit_kv, query in zip(case.low_bit_kvs, case.query, strict=True):
        if not low_bit_kv.length:
            continue
        means = torch.cat([run.fields["key_mean"] for run in low_bit_kv.runs]).float().transpose(0, 1).flatten(1, 2)
        means = means.repeat_interleave(low_bit_kv.group_size, dim=1)[:, : low_bit_kv.length]
        codes = ((torch_ops.dequantise(low_bit_kv)[0] - means) * case.weights.unsqueeze(1)) @ turn.T  # [Hkv, S, D]
        rotated = (query.unflatten(0, (case.heads, -1)) / case.weights[:, None, None]) @ turn.T
        bound = max(bound, (rotated.abs().amax() / 254 * codes.abs().sum(-1).max()).item())
    return bound


class Newest:
    """The recent tokens of every sequence of a case, and the constants of its attention."""

    def __init__(self, case, count, pending, sinks, softcap):
        generator = torch.Generator().manual_seed(count)
        dtype = case.keys[0].dtype
        shape = (2, case.heads, count, case.dim)
        self.recent = [
            RecentTokens(*torch.randn(shape, generator=generator).to(dtype), pending=pending if b % 2 == 0 else 0)
            for b in range(len(case.lengths))
        ]
        sink = torch.randn(case.query.shape[1], generator=generator) if sinks else None
        self.params = AttentionParams(SCALING, softcap, sink)

    def step(self, case, top_k, kind=None):
        return (kind or dispatch.layer_step)(case.query, case.low_bit_kvs, self.recent, top_k, self.params)

    def largest_value(self, case):
        return max(float(x.float().abs().max()) for x in [*(r.values for r in self.recent), *case.values] if x.numel())


def mean_prob(case, newest, step):
    """PyTorch's probabilities of the low-bit tokens, from a step on PyTorch operations."""
    return torch_ops.mean_probabilities(step._scores, step._rest_lse)


@st.composite
def newests(draw, case):
    pending = draw(st.sampled_from([0, 0, 1, 7, 32]))
    count = pending + draw(st.integers(2, 40))
    return Newest(case, count, pending, draw(st.booleans()), draw(st.sampled_from([None, 5.0])))


def random_rows(case, positions, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*positions.shape, 2 * case.dim, generator=generator).to(case.keys[0].dtype)


def check_selected(probabilities, positions, expected, error):
    """A selection is ascending, in range, and as likely as PyTorch's up to the scores' error."""
    assert positions.shape == expected.shape
    for chosen in (positions, expected):
        kept = chosen.masked_fill(chosen < 0, torch.iinfo(torch.int64).max)
        assert torch.equal(kept, kept.sort(-1).values)
    assert torch.equal((positions >= 0).sum(-1), (expected >= 0).sum(-1))
    mass, best = (probabilities.gather(-1, x.clamp(min=0)).where(x >= 0, 0.0).sum(-1) for x in (positions, expected))
    assert (mass >= best * math.exp(-4 * error) - 1e-6).all()


def measured_scores(case, softcap, t):
    """Score the low-bit key `t` of every sequence by attention -> float64 [B, Hkv, G, n].

    Every other pair is fetched, with a key that gets no weight and a value of zero. A recent token
    of known score and value zero takes about half of the attention, so that a query's output is the
    key's probability times its value.
    """
    raw = torch_ops.score(case.query, case.low_bit_kvs, case.lengths, SCALING, None)[..., t].double()
    query = case.query.double().unflatten(1, (case.heads, -1))  # [B, Hkv, G, n, D]
    dtype, (batch, heads, groups, n, _) = case.keys[0].dtype, query.shape
    solve = torch.linalg.pinv(query.flatten(2, 3))  # [B, Hkv, D, G n]: from scores to a key
    beside = (solve @ raw.nan_to_num(neginf=0.0).flatten(2, 3).unsqueeze(-1) / SCALING).squeeze(-1).to(dtype)  # [B, Hkv, D]
    unlikely = (solve.sum(-1) * (-200.0 / SCALING)).to(dtype)

    def weight(key):  # [B, Hkv, G, n]
        score = torch.einsum("bhgnd,bhd->bhgn", query, key.double()) * SCALING
        return (score if softcap is None else softcap * torch.tanh(score / softcap)).exp()

    keys = torch.stack([beside, unlikely][:n], dim=2)  # of the two queries only the last sees the second
    recent = [RecentTokens(keys[b], torch.zeros_like(keys[b])) for b in range(batch)]
    longest = max(case.lengths)
    positions = torch.full((batch, heads, n, longest), -1)
    for b, length in enumerate(case.lengths):
        fetched = torch.tensor([i for i in range(length) if i != t], dtype=torch.long)
        positions[b, ..., : len(fetched)] = fetched
    rows = torch.cat([unlikely, torch.zeros_like(unlikely)], dim=-1)[:, :, None, None].expand(-1, -1, n, longest, -1)
    step = dispatch.layer_step(case.query, case.low_bit_kvs, recent, TopK.always(1), AttentionParams(SCALING, softcap))
    step.attend_low_bit(positions)
    out = step.attend_fetched(positions, rows).double().unflatten(1, (heads, groups))
    found = torch.full_like(raw, torch.nan)
    for b, length in enumerate(case.lengths):
        if t >= length:
            continue
        value = torch_ops.dequantise(case.low_bit_kvs[b])[1][:, t].double()  # [Hkv, D]
        share = torch.einsum("hgnd,hd->hgn", out[b], value) / value.square().sum(-1)[:, None, None]
        others = weight(beside)[b] + (length - 1) * weight(unlikely)[b]
        others[..., 1:] += weight(unlikely)[b, ..., 1:]
        found[b] = (share * others / (1 - share)).log()
    return found


@every_isa
@settings(max_examples=25, deadline=None)
@given(case=cases(), place=st.floats(0, 1))
def test_scores_equal_pytorchs_up_to_the_rounded_query(isa, case, place):
    t = round(place * (max(case.lengths) - 1))
    for softcap in (None, 5.0):
        expected = torch_ops.score(case.query, case.low_bit_kvs, case.lengths, SCALING, softcap)[..., t]
        with dispatch.using(isa):
            found = measured_scores(case, softcap, t)
        stored = torch.tensor(case.lengths) > t
        assert (found - expected)[stored].abs().max() <= 1.01 * SCALING * rounding_bound(case) + 2e-4


@every_isa
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_score_errors_are_small_relative_to_the_largest(isa, code, bits):
    case = Case(code, bits, 64, 128, 2, 4, 2, [32], bits, torch.bfloat16)
    expected = torch_ops.score(case.query, case.low_bit_kvs, case.lengths, SCALING, None)
    limit = 0.01 if code is Code.ROTATED else 2e-4
    for t in (0, 77, 511, 512, 2047):
        with dispatch.using(isa):
            found = measured_scores(case, None, t)
        assert (found - expected[..., t]).abs().max() <= limit * expected.abs().max()


def every_position(case):
    positions = torch.arange(max(case.lengths)).expand(len(case.lengths), case.heads, case.rows, -1).clone()
    for b, length in enumerate(case.lengths):
        positions[b, ..., length:] = -1
    return positions


@every_isa
@settings(max_examples=40, deadline=None)
@given(data=st.data(), case=cases(), top_k=top_ks(), levels=st.sampled_from([2, 5, 10**6]))
def test_selections_among_exact_scores_equal_pytorchs(isa, data, case, top_k, levels):
    """Of equal scores the lower position wins. Pending tokens compete for the next step."""
    newest = data.draw(newests(case))
    positions = every_position(case)
    longest = positions.shape[-1]
    kinds = random_rows(case, positions[..., : min(levels, longest)], top_k.short)  # [B, Hkv, n, levels, 2 D]
    chosen = torch.randint(0, kinds.shape[3], (longest,), generator=torch.Generator().manual_seed(top_k.short))
    if levels > longest:
        chosen = torch.arange(longest)
    plain = newest.step(case, top_k, TorchLayerStep)
    scores = torch_ops.exact_scores(case.query, plain._scores, kinds, SCALING, newest.params.softcap)[..., chosen]
    for b, length in enumerate(case.lengths):
        scores[b, ..., length:] = -torch.inf
    expected = torch_ops.select(scores, plain._rest_lse, case.lengths, top_k)
    with dispatch.using(isa):
        step = newest.step(case, top_k)
        step.rescore(positions, kinds[..., chosen, :])
        found, following = step.select(), step.select_next()
    if levels < 10:
        assert torch.equal(found, expected)
    probabilities = torch_ops.mean_probabilities(scores, plain._rest_lse)
    check_selected(probabilities, found, expected, 3e-6)
    plain.rescore(positions, kinds[..., chosen, :])
    plain.select()
    for b, tokens in enumerate(newest.recent):  # probabilities of the last query: low-bit tokens, then pending ones
        length = case.lengths[b]
        everything = torch.logaddexp(scores[b, :, :, -1].logsumexp(-1), plain._rest_lse[b, :, :, -1])  # [Hkv, G]
        waiting = exact.scores(case.query[b], tokens.keys[:, : tokens.pending], newest.params)[:, :, -1]
        line = torch.cat([scores[b, :, :, -1, :length], waiting], dim=-1)
        likely = (line - everything.unsqueeze(-1)).exp().mean(1)  # [Hkv, length + pending]
        likely = torch.nn.functional.pad(likely, (0, 1))  # a sequence may have none
        check_selected(likely, following[b], plain.select_next()[b], 3e-6)


@every_isa
@settings(max_examples=40, deadline=None)
@given(data=st.data(), case=cases())
def test_low_bit_values_are_summed_up_to_weights_of_8_bits(isa, data, case):
    """With exact scores on both sides, and nothing fetched."""
    newest = data.draw(newests(case))
    positions = every_position(case)
    rows, none = random_rows(case, positions, 1), positions[..., :0]
    plain = newest.step(case, TopK.always(8), TorchLayerStep)
    plain.rescore(positions, rows)
    wanted = plain.attend_fetched(none, rows[..., :0, :])
    with dispatch.using(isa):
        step = newest.step(case, TopK.always(8))
        step.rescore(positions, rows)
        step.attend_low_bit(none)
        differences = (step.attend_fetched(none, rows[..., :0, :]) - wanted).abs()
    largest = newest.largest_value(case)
    assert differences.max() <= VALUE_ERROR * largest
    assert differences.mean() <= VALUE_ERROR / 5 * largest


@every_isa
@settings(max_examples=40, deadline=None)
@given(data=st.data(), case=cases())
def test_a_step_with_every_pair_fetched_is_exact(isa, data, case):
    newest = data.draw(newests(case))
    positions = every_position(case)
    rows = random_rows(case, positions, 2)
    wanted = newest.step(case, TopK.always(8), TorchLayerStep).attend_fetched(positions, rows)
    with dispatch.using(isa):
        step = newest.step(case, TopK.always(8))
        step.attend_low_bit(positions)
        out = step.attend_fetched(positions, rows)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5 * max(newest.largest_value(case), float(rows.abs().max())))


@every_isa
@settings(max_examples=60, deadline=None)
@given(data=st.data(), case=cases(), top_k=top_ks(least=0))
def test_a_layer_step_equals_pytorchs_up_to_rounded_queries_and_weights(isa, data, case, top_k):
    """A step that verifies: selected rows, of which the draft query does not get all."""
    newest = data.draw(newests(case))
    error = 1.01 * SCALING * float(rounding_bound(case)) + 1e-4  # of a score
    plain = newest.step(case, top_k, TorchLayerStep)
    probabilities = mean_prob(case, newest, plain)
    with dispatch.using(isa):
        step = newest.step(case, top_k)
        check_selected(probabilities, step.select(), plain.select(), error)
        found, expected = step.select_next(), plain.select_next()
        assert found.shape == expected.shape
        assert torch.equal((found >= 0).sum(-1), (expected >= 0).sum(-1))
        if not any(tokens.pending for tokens in newest.recent):
            check_selected(probabilities[:, :, -1], found, expected, error)
        positions = plain.select().clone()
        positions[:, :, -1, ::3] = -1
        rows = random_rows(case, positions, top_k.short)
        step.attend_low_bit(positions)
        out = step.attend_fetched(positions, rows)
    wanted = plain.attend_fetched(positions, rows)
    largest = max(newest.largest_value(case), float(rows.abs().max()) if rows.numel() else 0.0)
    assert (out - wanted).abs().max() <= (VALUE_ERROR + math.expm1(2 * error)) * largest


@every_isa
@pytest.mark.parametrize("rows", [1, 2])
def test_pending_tokens_are_selected_where_they_are_likely(isa, rows):
    """Positions of the next step: those of the low-bit copy, then the pending tokens."""
    case = Case(Code.ROTATED, 2, 64, 64, 2, 2, rows, [4, 0, 1], 3, torch.float32)
    newest = Newest(case, 70, 64, False, None)
    newest.recent[2] = RecentTokens(newest.recent[2].keys, newest.recent[2].values, pending=64)
    for b in (0, 2):  # every other pending key is that of the last query's group
        grouped = case.query[b].unflatten(0, (case.heads, -1))
        newest.recent[b].keys[:, :64:2] = 9 * grouped[:, :, -1].mean(1).unsqueeze(1)
    plain = newest.step(case, TopK.always(32), TorchLayerStep)
    with dispatch.using(isa):
        step = newest.step(case, TopK.always(32))
        for one in (step, plain):
            one.select()
        found = step.select_next()
    for b in (0, 2):
        assert found[b].tolist() == [list(range(case.lengths[b], case.lengths[b] + 64, 2))] * case.heads
    assert (found[1] == -1).all()
    assert torch.equal(found, plain.select_next())


@every_isa
def test_select_reads_a_long_line_of_scores_to_its_end(isa):
    case = Case(Code.ROTATED, 4, 64, 32, 1, 2, 1, [782], 0, torch.float32)
    case.keys[0][:, -1] = 20 * case.query[0].mean((0, 1))
    case.tables = [case.filled(case.keys[0], case.values[0])]
    case.low_bit_kvs = [case.low_bit_kv(case.tables[0])]
    with dispatch.using(isa):
        positions = Newest(case, 2, 0, False, None).step(case, TopK.always(64)).select()
    assert (positions[..., -1] == case.lengths[0] - 1).all()


@every_isa
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("dim", "groups"), [(96, 7), (128, 3)])
def test_long_sequences_equal_pytorchs(isa, bits, dim, groups):
    """Past a stretch of 512 and a chunk of 2,048 tokens, with as many queries as share a pass and
    more than are summed in one.
    """
    case = Case(Code.ROTATED, bits, 64, dim, 2, groups, 2, [41, 9], bits, torch.bfloat16)
    newest = Newest(case, 20, 0, True, None)
    positions = every_position(case)
    rows, none = random_rows(case, positions, 0), positions[..., :0]
    rows[..., :dim] *= 0.5  # weights spread over the pages, as they mostly do
    plain = newest.step(case, TopK.always(64), TorchLayerStep)
    expected = torch_ops.score(case.query, case.low_bit_kvs, case.lengths, SCALING, None)
    plain.rescore(positions, rows)
    with dispatch.using(isa):
        for t in (511, 2048, 41 * 64 - 1):
            error = (measured_scores(case, None, t) - expected[..., t])[torch.tensor(case.lengths) > t].abs().max()
            assert error <= 1.01 * SCALING * rounding_bound(case) + 2e-4
        step = newest.step(case, TopK.always(64))
        step.rescore(positions, rows)
        check_selected(mean_prob(case, newest, plain), step.select(), plain.select(), 3e-6)
        step.attend_low_bit(none)
        out = step.attend_fetched(none, rows[..., :0, :])
    wanted = plain.attend_fetched(none, rows[..., :0, :])
    assert (out - wanted).abs().max() <= 1e-3 * newest.largest_value(case)


@every_isa
@settings(max_examples=25, deadline=None)
@given(case=cases(), step=st.floats(0, 1))
def test_codes_equal_pytorchs(isa, case, step):
    """KIVI's to the bit. A rotation adds up in another order: there a code may differ where the
    last bit decides.
    """
    for keys, values, expected in zip(case.keys, case.values, case.low_bit_kvs, strict=True):
        if not expected.length:
            continue
        with dispatch.using(isa):
            table = case.filled(keys, values, (step,))
        found = torch_ops.dequantise(case.low_bit_kv(table))
        for ours, theirs in zip(found, torch_ops.dequantise(expected), strict=True):
            if case.code is Code.KIVI:
                assert torch.equal(ours, theirs)
            else:
                differs = ((ours - theirs).abs() > 1e-3 * theirs.abs().max()).any(-1)  # of a token
                assert differs.float().mean() <= max(0.02, 1.5 / differs.numel())


BLOCKS = (None, 16, 64)  # tokens of a block of rows


class InPlace:
    """A layer of one sequence of a case, with its 16-bit rows in memory
    (`specache.kernels.types.StoredLayer`).

    Args:
        recent: the newest tokens, of which the last `rows` are those of the step.
    """

    def __init__(self, case, b, recent, rows, commits):
        self.index, self.kept, self.table = 0, None, case.tables[b]
        self.low_bit_kv, self.channel_scales = case.low_bit_kvs[b], case.low_bit_kvs[b].channel_scales
        self.residual_count = recent.keys.shape[1] - rows
        newest = torch.stack([recent.keys, recent.values])
        self.residual_buffer = newest.new_full((2, case.heads, self.residual_count + commits, case.dim), float("nan"))
        self.residual_buffer[:, :, : self.residual_count] = newest[:, :, : self.residual_count]
        kv_rows = torch.cat([torch.cat([case.keys[b], recent.keys], 1), torch.cat([case.values[b], recent.values], 1)], dim=-1)
        kv_rows[:, kv_rows.shape[1] - rows :] = float("nan")
        self._tokens = kv_rows.shape[1]
        tier = RamTier(True, RowMemory(block_tokens=BLOCKS[b % len(BLOCKS)]))
        tier.write(0, 0, *kv_rows.chunk(2, dim=-1))
        self._stored = tier.rows(0)
        self._tier = tier

    @property
    def rows(self):
        """The rows [Hkv, S, 2 D] as they are now."""
        return self._stored.read(0, self._tokens)

    def rows_with_room(self, tokens):
        return self._stored


def of_step(recent, rows):
    """Keys and values [B, Hkv, n, D] of the step's tokens, with the strides of a model's."""
    tokens = torch.stack([torch.stack([one.keys[:, -rows:], one.values[:, -rows:]]) for one in recent], dim=1)
    return tokens.transpose(2, 3).contiguous().transpose(2, 3)


@every_isa
@settings(max_examples=15, deadline=None)
@given(
    data=st.data(),
    case=cases(),
    top_k=top_ks(),
    commits=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_one_call_and_several_give_the_same_bits_on_any_number_of_threads(isa, data, case, top_k, commits, dtype):
    newest = data.draw(newests(case))
    case.query = case.query.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)  # as a model makes it
    keys, values = of_step(newest.recent, case.rows)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with dispatch.using(isa):
                layers = [InPlace(case, b, recent, case.rows, commits) for b, recent in enumerate(newest.recent)]
                for _ in range(2):  # the second time it knows the layers' addresses
                    out = dispatch.decode_in_place(case.query, keys, values, layers, commits, top_k, newest.params)
                    assert out.shape == (len(layers), case.rows, case.query.shape[1], case.dim)
                    outs.append(out.transpose(1, 2))
                step = newest.step(case, top_k)
                positions = step.select()  # [B, Hkv, n, k]
                heads = torch.arange(case.heads).view(-1, 1, 1)
                stored = [torch.cat([k_, v_], dim=-1) for k_, v_ in zip(case.keys, case.values, strict=True)]
                rows = [
                    rows_[heads, at.clamp(min=0)] if rows_.shape[1] else torch.zeros(*at.shape, 2 * case.dim, dtype=rows_.dtype)
                    for rows_, at in zip(stored, positions, strict=True)
                ]
                step.attend_low_bit(positions)
                outs.append(step.attend_fetched(positions, torch.stack(rows)).to(dtype))
                for layer, recent, b in zip(layers, newest.recent, range(len(layers)), strict=True):
                    check_stored(case, layer, recent, b, commits)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outs[0], other) for other in outs[1:])


def check_stored(case, layer, recent, b, commits):
    """The committed token is in the residual and in the rows, and nothing else changed."""
    stored = layer.residual_count + commits
    assert torch.equal(layer.residual_buffer, torch.stack([recent.keys, recent.values])[:, :, :stored])
    newest = torch.cat([recent.keys, recent.values], dim=-1)
    length = case.lengths[b]
    assert torch.equal(layer.rows[:, length : length + stored], newest[:, :stored])
    assert layer.rows[:, length + stored :].isnan().all()


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_a_step_in_place_stores_nothing_of_a_batch_where_one_token_is_not_finite(isa, dtype, bad, name):
    case = Case(Code.ROTATED, 2, 64, 64, 2, 1, 2, [1, 1], 0, dtype)
    newest = Newest(case, 5, 0, False, None)
    tokens = dict(zip(("keys", "values"), of_step(newest.recent, 2), strict=True))
    tokens[name][1, 1, 0, 63] = bad
    layers = [InPlace(case, b, recent, 2, True) for b, recent in enumerate(newest.recent)]
    with dispatch.using(isa), pytest.raises(NonFiniteError, match=f"in the {name} of layer 0"):
        dispatch.decode_in_place(case.query, tokens["keys"], tokens["values"], layers, True, TopK.always(8), newest.params)
    for layer in layers:
        assert layer.residual_buffer[:, :, -1].isnan().all()
        assert layer.rows[:, -2:].isnan().all()
    tokens[name][1, 1, 0, 63] = 0.0
    tokens[name][1, 1, 1, 63] = bad  # the draft token's, which is not stored
    with dispatch.using(isa):
        dispatch.decode_in_place(case.query, tokens["keys"], tokens["values"], layers, True, TopK.always(8), newest.params)


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sink_dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_place_rounds_its_result_as_pytorch_does(isa, dtype, sink_dtype):
    """Also to subnormal numbers, and beyond the largest of float16."""
    case = Case(Code.ROTATED, 2, 64, 64, 2, 1, 1, [0], 0, torch.float32)
    newest = Newest(case, 2, 0, True, None)
    newest.recent[0].values[:] = torch.randn(64) * torch.logspace(-9, 6, 64)
    newest.params = AttentionParams(SCALING, None, newest.params.sinks.to(sink_dtype))
    keys, values = of_step(newest.recent, 1)
    outs = []
    with dispatch.using(isa):
        for of_query in (torch.float32, dtype):
            query = case.query.to(dtype).to(of_query)
            outs.append(
                dispatch.decode_in_place(
                    query, keys, values, [InPlace(case, 0, newest.recent[0], 1, True)], True, TopK.always(8), newest.params
                )
            )
    assert torch.equal(outs[1], outs[0].to(dtype))


@every_isa
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_packed(isa, bad):
    case = Case(Code.ROTATED, 2, 64, 64, 2, 1, 1, [1], 0, torch.float32)
    before = case.tables[0].pool.page_bytes(case.tables[0].pages[0]).clone()
    keys = case.keys[0].clone()
    keys[1, 3, 5] = bad
    with dispatch.using(isa), pytest.raises(NonFiniteError):
        dispatch.quantise(keys, case.values[0], case.low_bit_kvs[0], 0)
    assert torch.equal(before, case.tables[0].pool.page_bytes(case.tables[0].pages[0]))


def test_calls_from_several_threads_do_not_mix():
    case = Case(Code.ROTATED, 2, 64, 64, 2, 2, 1, [40], 0, torch.float32)
    newest = Newest(case, 9, 0, False, None)
    expected = newest.step(case, TopK.always(16)).select()
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(newest.step(case, TopK.always(16)).select(), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@every_isa
@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_a_query_that_is_not_finite_stays_in_range(isa, factor):
    case = Case(Code.ROTATED, 2, 64, 64, 2, 2, 1, [40], 0, torch.float32)
    case.query = case.query * factor
    newest = Newest(case, 70, 64, False, None)
    with dispatch.using(isa):
        step = newest.step(case, TopK.always(16))
        positions, following = step.select(), step.select_next()
    assert ((positions >= 0) & (positions < case.lengths[0])).all()
    assert ((following >= 0) & (following < case.lengths[0] + 64)).all()


def test_an_unknown_backend_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match="torch"), dispatch.using("mmx"):
        pass


@pytest.fixture
def environment(monkeypatch):
    """Name a backend in the environment, as a process finds it that has not chosen one yet."""

    def name(backend):
        monkeypatch.setenv(dispatch.VARIABLE, backend)
        dispatch._default.cache_clear()
        native_products.instruction_set.cache_clear()

    yield name
    dispatch._default.cache_clear()
    native_products.instruction_set.cache_clear()


def test_an_unknown_backend_in_the_environment_is_a_config_error(environment, capsys):
    environment("mmx")
    with pytest.raises(SystemExit) as end:
        app(["doctor"])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: SPECACHE_KERNELS='mmx'") and "Traceback" not in printed


def test_missing_native_kernels_warn_once(monkeypatch):
    case = Case(Code.ROTATED, 2, 64, 64, 2, 2, 1, [1], 0, torch.float32)
    monkeypatch.setattr(native, "IMPORT_ERROR", "no module")
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    dispatch._warn_without_native.cache_clear()
    with pytest.warns(RuntimeWarning, match="specache doctor"):
        Newest(case, 2, 0, False, None).step(case, TopK.always(16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Newest(case, 2, 0, False, None).step(case, TopK.always(16))


@pytest.mark.parametrize("name", ["torch", *ISAS])
def test_the_environment_chooses_the_backend(environment, name):
    environment(name)
    assert dispatch.active()["score"] == name
