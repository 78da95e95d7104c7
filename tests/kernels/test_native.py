"""The C++ kernels against plain PyTorch, on every instruction set of this machine."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specache.config import Code
from specache.errors import ConfigError, NonFiniteError
from specache.kernels import dispatch
from specache.kernels.cpu import native
from specache.kernels.cpu.native import RecentTokens
from specache.kernels.torch import operations as torch_ops
from specache.kernels.torch import rotated as torch_rotated
from specache.low_bit.layout import PageLayout
from specache.low_bit.pool import PagePool, PageTable
from specache.platform.budget import ByteBudget

ISAS = native.instruction_sets()
pytestmark = pytest.mark.skipif(not ISAS, reason=f"the C++ kernels are not built: {native.IMPORT_ERROR}")

# Rounding a page's weights to 8 bits, as a share of the largest value.
VALUE_ERROR = 0.015


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
        code=draw(st.sampled_from(list(Code))),
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


@every_isa
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_scores_equal_pytorchs_up_to_the_rounded_query(isa, case):
    for softcap in (None, 5.0):
        expected = torch_ops.score(case.query, case.low_bit_kvs, case.lengths, 0.2, softcap)
        with dispatch.using(isa):
            scores = dispatch.score(case.query, case.low_bit_kvs, case.lengths, 0.2, softcap)
        assert torch.equal(scores == -torch.inf, expected == -torch.inf)  # past the end of each sequence
        finite = expected != -torch.inf
        error = (scores - expected)[finite].abs().max()
        assert error <= 1.01 * 0.2 * rounding_bound(case) + 1e-4


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


@every_isa
@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_score_errors_are_small_relative_to_the_largest(isa, code, bits):
    case = Case(code, bits, 64, 128, 2, 4, 2, [32], bits, torch.bfloat16)
    expected = torch_ops.score(case.query, case.low_bit_kvs, case.lengths, 0.1, None)
    with dispatch.using(isa):
        scores = dispatch.score(case.query, case.low_bit_kvs, case.lengths, 0.1, None)
    limit = 0.01 if code is Code.ROTATED else 2e-4
    assert (scores - expected).abs().max() <= limit * expected.abs().max()


@every_isa
@settings(max_examples=25, deadline=None)
@given(case=cases(), k=st.integers(1, 70), levels=st.sampled_from([2, 5, 10**6]))
def test_select_equals_pytorchs(isa, case, k, levels):
    """Also among equal scores: the lower position wins."""
    size = max(case.lengths)
    shape = (*case.rest.shape[:3], case.rest.shape[3], size)
    scores = torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(k)).float() * (8 / levels)
    for b, length in enumerate(case.lengths):
        scores[b, ..., length:] = -torch.inf
    expected = torch_ops.select(scores, case.rest, case.lengths, k)
    with dispatch.using(isa):
        positions = dispatch.select(scores, case.rest, case.lengths, k)
    if levels < 10:
        assert torch.equal(positions, expected)
        return
    mean_prob = torch_ops.mean_probabilities(scores, case.rest)
    for found in (positions, expected):  # two ways to compute an exponential order near equals differently
        assert torch.equal(found, found.sort(-1).values) or (found == -1).any()
    torch.testing.assert_close(_mass_of(mean_prob, positions), _mass_of(mean_prob, expected), rtol=1e-5, atol=0)


def _mass_of(mean_prob, positions):
    return mean_prob.gather(-1, positions.clamp(min=0)).where(positions >= 0, 0.0).sort(-1).values


@every_isa
def test_select_reads_a_long_line_of_scores_to_its_end(isa):
    scores = torch.randn(1, 2, 3, 1, 50_001, generator=torch.Generator().manual_seed(0))
    scores[..., 50_000] = 9.0
    rest = torch.zeros(1, 2, 3, 1)
    with dispatch.using(isa):
        positions = dispatch.select(scores, rest, [50_001], 64)
    assert torch.equal(positions, torch_ops.select(scores, rest, [50_001], 64))
    assert (positions[..., -1] == 50_000).all()


@every_isa
@settings(max_examples=25, deadline=None)
@given(case=cases(), k=st.integers(1, 9))
def test_rescore_and_attend_equal_pytorchs_up_to_rounded_weights(isa, case, k):
    scores = torch_ops.score(case.query, case.low_bit_kvs, case.lengths, 0.2, None)
    positions = torch_ops.select(scores, case.rest, case.lengths, k)
    generator = torch.Generator().manual_seed(k)
    rows = torch.randn(*positions.shape, 2 * case.dim, generator=generator).to(case.keys[0].dtype)
    expected = scores.clone()
    torch_ops.rescore(case.query, expected, positions, rows, 0.2, None)
    with dispatch.using(isa):
        dispatch.rescore(case.query, scores, positions, rows, 0.2, None)
        finite = expected != -torch.inf
        torch.testing.assert_close(scores[finite], expected[finite], rtol=1e-5, atol=1e-5)
        out, lse = dispatch.attend(scores, positions, rows, case.low_bit_kvs, case.lengths)
    expected_out, expected_lse = torch_ops.attend(expected, positions, rows, case.low_bit_kvs, case.lengths)
    for b, length in enumerate(case.lengths):
        if length:
            torch.testing.assert_close(lse[b], expected_lse[b], rtol=1e-5, atol=1e-5)
            assert (out[b] - expected_out[b]).abs().max() <= VALUE_ERROR * case.values[b].float().abs().max()
        else:
            assert (lse[b] == -torch.inf).all()
            assert (out[b] == 0).all()


@every_isa
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("dim", "groups"), [(96, 7), (128, 3)])
def test_long_sequences_equal_pytorchs(isa, bits, dim, groups):
    """Past a stretch of 512 and a chunk of 2,048 tokens, with as many queries as share a pass and
    more than are summed in one.
    """
    case = Case(Code.ROTATED, bits, 64, dim, 2, groups, 2, [41, 9], bits, torch.bfloat16)
    expected = torch_ops.score(case.query, case.low_bit_kvs, case.lengths, 0.1, None)
    positions = torch_ops.select(expected, case.rest, case.lengths, 64)
    rows = torch.randn(*positions.shape, 2 * dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    with dispatch.using(isa):
        scores = dispatch.score(case.query, case.low_bit_kvs, case.lengths, 0.1, None)
        out, lse = dispatch.attend(expected, positions, rows, case.low_bit_kvs, case.lengths)
    finite = expected != -torch.inf
    assert torch.equal(scores != -torch.inf, finite)
    assert (scores - expected)[finite].abs().max() <= 1.01 * 0.1 * rounding_bound(case) + 1e-4
    expected_out, expected_lse = torch_ops.attend(expected, positions, rows, case.low_bit_kvs, case.lengths)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert (out - expected_out).abs().max() <= 1e-3 * max(values.float().abs().max() for values in case.values)


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


@every_isa
@settings(max_examples=60, deadline=None)
@given(case=cases(), k=st.integers(1, 70), recent=st.integers(2, 40), sinks=st.booleans())
def test_one_call_does_what_the_single_kernels_do(isa, case, k, recent, sinks):
    dtype, generator = case.keys[0].dtype, torch.Generator().manual_seed(k)
    heads, dim, query = case.heads, case.dim, case.query
    newest = [torch.randn(2, heads, recent, dim, generator=generator).to(dtype) for _ in case.lengths]
    stored = [torch.cat([k_, v_], dim=-1) for k_, v_ in zip(case.keys, case.values, strict=True)]
    sink = torch.randn(query.shape[1], generator=generator) if sinks else None
    with dispatch.using(isa):
        backend = dispatch.fused(query)
        assert backend is not None
        out = backend.decode_in_place(
            query, case.low_bit_kvs, [RecentTokens(x[0], x[1]) for x in newest], stored, k, 0.2, None, sink
        )
        for b, low_bit_kv in enumerate(case.low_bit_kvs):
            for row in range(case.rows):  # an earlier row does not see a later one's token
                seen = newest[b][:, :, : recent - (case.rows - 1 - row)]
                expected = _one_by_one(query[b : b + 1, :, row : row + 1], low_bit_kv, seen, stored[b], k, sink)
                # a weight between two bytes may be rounded either way
                differences = (out[b, :, row : row + 1] - expected).abs()
                largest = max(float(newest[b][1].abs().max()), float(case.values[b].abs().max()) if low_bit_kv.length else 0.0)
                assert differences.max() <= largest / 255 and differences.mean() <= 2e-4 * largest


@every_isa
@settings(max_examples=15, deadline=None)
@given(case=cases(), k=st.integers(1, 70), recent=st.integers(2, 40))
def test_one_call_and_three_give_the_same_bits_on_any_number_of_threads(isa, case, k, recent):
    dtype, generator = case.keys[0].dtype, torch.Generator().manual_seed(k)
    newest = [RecentTokens(*torch.randn(2, case.heads, recent, case.dim, generator=generator).to(dtype)) for _ in case.lengths]
    stored = [torch.cat([k_, v_], dim=-1) for k_, v_ in zip(case.keys, case.values, strict=True)]
    k = min(k, max(case.lengths))
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with dispatch.using(isa):
                backend = dispatch.fused(case.query)
                outs.append(backend.decode_in_place(case.query, case.low_bit_kvs, newest, stored, k, 0.2, None, None))
                step = backend.layer_step(case.query, case.low_bit_kvs, newest, k, 0.2, None, None)
                positions = step.select()  # [B, Hkv, n, k]
                heads = torch.arange(case.heads).view(-1, 1, 1)
                rows = [
                    rows_[heads, at.clamp(min=0)] if rows_.shape[1] else torch.zeros(*at.shape, 2 * case.dim, dtype=dtype)
                    for rows_, at in zip(stored, positions, strict=True)
                ]
                step.attend_low_bit(positions)
                outs.append(step.attend_fetched(positions, torch.stack(rows)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outs[0], other) for other in outs[1:])


def _one_by_one(query, low_bit_kv, newest, stored, k, sink):
    heads, dim = low_bit_kv.num_kv_heads, low_bit_kv.head_dim
    grouped = query[0].unflatten(0, (heads, -1))  # [Hkv, G, 1, D]
    recent = grouped[:, :, 0] @ newest[0].float().transpose(1, 2) * 0.2  # [Hkv, G, r]
    rest = recent if sink is None else torch.cat([recent, sink.view(heads, -1, 1)], dim=-1)
    rest_lse = rest.logsumexp(-1)
    recent_out = (recent - rest_lse.unsqueeze(-1)).exp() @ newest[1].float()
    if low_bit_kv.length == 0:
        return recent_out.flatten(0, 1).unsqueeze(1)
    scores = dispatch.score(query, [low_bit_kv], [low_bit_kv.length], 0.2, None)
    positions = dispatch.select(scores, rest_lse[None, :, :, None], [low_bit_kv.length], k)
    rows = stored[torch.arange(heads)[:, None], positions[0, :, 0].clamp(min=0)][None, :, None]
    dispatch.rescore(query, scores, positions, rows, 0.2, None)
    out, lse = dispatch.attend(scores, positions, rows, [low_bit_kv], [low_bit_kv.length])
    total = torch.logaddexp(lse[0, :, :, 0], rest_lse)
    joined = out[0, :, :, 0] * (lse[0, :, :, 0] - total).exp().unsqueeze(-1) + recent_out * (rest_lse - total).exp().unsqueeze(-1)
    assert joined.shape[-1] == dim
    return joined.flatten(0, 1).unsqueeze(1)


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


@every_isa
def test_any_number_of_threads_gives_the_same_bits(isa):
    case = Case(Code.ROTATED, 2, 64, 64, 3, 3, 2, [90, 7], 0, torch.float32)
    outs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with dispatch.using(isa):
                scores = dispatch.score(case.query, case.low_bit_kvs, case.lengths, 0.2, None)
                positions = dispatch.select(scores, case.rest, case.lengths, 16)
                rows = torch.zeros(*positions.shape, 2 * case.dim)
                outs.append((positions, *dispatch.attend(scores, positions, rows, case.low_bit_kvs, case.lengths)))
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))


def test_calls_from_several_threads_do_not_mix():
    case = Case(Code.ROTATED, 2, 64, 64, 2, 2, 1, [40], 0, torch.float32)
    expected = dispatch.score(case.query, case.low_bit_kvs, case.lengths, 0.2, None)
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(dispatch.score(case.query, case.low_bit_kvs, case.lengths, 0.2, None), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@every_isa
def test_a_query_that_is_not_finite_stays_in_range(isa):
    case = Case(Code.ROTATED, 2, 64, 64, 2, 2, 1, [40], 0, torch.float32)
    scores = torch.full((1, 2, 2, 1, case.lengths[0]), float("nan"))
    with dispatch.using(isa):
        dispatch.score(case.query * float("inf"), case.low_bit_kvs, case.lengths, 0.2, None)
        positions = dispatch.select(scores, case.rest, case.lengths, 16)
    assert ((positions >= 0) & (positions < case.lengths[0])).all()


def test_an_unknown_backend_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match="torch"), dispatch.using("mmx"):
        pass


def test_an_unknown_backend_in_the_environment_is_a_config_error():
    command = [sys.executable, "-c", "from specache.cli.main import app; app()", "doctor"]
    result = subprocess.run(command, env={"SPECACHE_KERNELS": "mmx", "PATH": ""}, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: SPECACHE_KERNELS='mmx'") and "Traceback" not in result.stderr


def test_missing_native_kernels_warn_once(monkeypatch):
    monkeypatch.setattr(native, "IMPORT_ERROR", "no module")
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    dispatch._warn_without_native.cache_clear()
    with pytest.warns(RuntimeWarning, match="specache doctor"):
        dispatch.fused(torch.zeros(1, 1, 1, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.fused(torch.zeros(1, 1, 1, 8))


@pytest.mark.parametrize("name", ["torch", *ISAS])
def test_the_environment_chooses_the_backend(name):
    code = "from specache.kernels import dispatch; print(dispatch.active()['score'])"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"SPECACHE_KERNELS": name, "PATH": ""}, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == name
