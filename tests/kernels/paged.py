"""A batch's low-bit copies as the kernels of a static step see them, beside PyTorch's results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specache.config import PAGE_TOKENS, TopK
from specache.kernels.torch import operations as torch_ops
from specache.kernels.triton.tables import PageScores, PageTables, offsets_of
from specache.kernels.types import LowBitKV
from tests.kernels.test_native import Case

CPU = torch.device("cpu")
HALF = 2.0**-11  # what float16 rounds off of a number
OUT_ERROR = 1.5 * 2.0**-8  # of the largest value: weights round to bfloat16, and are of scores that are rounded too


class PagedCase:
    """A case in a model's dtype, with room for a page more than its longest sequence has.

    Args:
        low_bit_kvs: its copies on another device.
    """

    def __init__(
        self, case: Case, dtype: torch.dtype, low_bit_kvs: Sequence[LowBitKV] | None = None, device: torch.device = CPU
    ) -> None:
        self.case, self.dtype, self.lengths = case, dtype, case.lengths
        self.low_bit_kvs = low_bit_kvs or case.low_bit_kvs
        self.query, self.rest = case.query.to(device, dtype), case.rest.to(device)
        self.tables = page_tables(self.low_bit_kvs, case.lengths, max(case.lengths) // PAGE_TOKENS + 2)
        scales = [low_bit_kv.channel_scales for low_bit_kv in self.low_bit_kvs]
        self._channel_scales = None if scales[0] is None else torch.stack(scales)
        self._one = next(low_bit_kv for low_bit_kv in self.low_bit_kvs if low_bit_kv.runs)

    def score(self, kernels: Any, softcap: float | None) -> PageScores:
        """Score; float16 scores behind a sequence's end, which nothing may read, become NaN."""
        arguments = self.tables, self._channel_scales, offsets_of(self._one), self._one
        scores = kernels.score_pages(self.query, *arguments, 0.2, softcap)
        assert scores.is_half == (self.dtype != torch.float32)
        for b, length in enumerate(self.lengths if scores.is_half else ()):
            scores.values[b, ..., length:] = torch.nan
        return scores

    def attend(self, kernels: Any, scores: PageScores, positions: Tensor, kv_rows: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.attend_pages(scores, positions, kv_rows, self.tables, offsets_of(self._one), self._one)

    def torch_scores(self, softcap: float | None) -> Tensor:
        """PyTorch's scores, float32 [B, Hkv, G, n, capacity]."""
        scores = torch_ops.score(self.query, self.low_bit_kvs, self.lengths, 0.2, softcap)
        return torch.nn.functional.pad(scores, (0, self.tables.capacity - scores.shape[-1]), value=-torch.inf)

    def torch_attend(self, scores: Tensor, positions: Tensor, kv_rows: Tensor) -> tuple[Tensor, Tensor]:
        scores = scores[..., : max(self.lengths)].contiguous()
        return torch_ops.attend(scores, positions, kv_rows, self.low_bit_kvs, self.lengths)

    def positions(self, scores: Tensor, k: int) -> Tensor:
        """The top k of scores; the draft query lacks every third one."""
        positions = torch_ops.select(scores, self.rest, self.lengths, TopK.always(k))
        positions[:, :, -1, ::3] = -1
        return positions

    def kv_rows(self, positions: Tensor, seed: int) -> Tensor:
        """Random rows [B, Hkv, n, k, 2 D]."""
        return torch.randn(*positions.shape, 2 * self.case.dim, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    def largest(self, kv_rows: Tensor) -> float:
        """The largest of the values that are summed."""
        return max(float(values.float().abs().max()) for values in (*self.case.values, kv_rows) if values.numel())


def page_tables(low_bit_kvs: Sequence[LowBitKV], lengths: Sequence[int], pages: int) -> PageTables:
    """Page tables with room for so many pages per sequence. Address 0 stands for none."""
    device = next(run.device_addresses.device for low_bit_kv in low_bit_kvs for run in low_bit_kv.runs)
    addresses = torch.zeros(len(lengths), pages, dtype=torch.int64, device=device)
    for row, low_bit_kv in zip(addresses, low_bit_kvs, strict=True):
        for run in low_bit_kv.runs:
            row[: run.pages], row = run.device_addresses, row[run.pages :]
    return PageTables(addresses, torch.tensor(lengths, dtype=torch.int32, device=device))


def absolute_scores(scores: PageScores, lengths: Tensor) -> Tensor:
    """Absolute scores float32 of all queries, -inf past the lengths."""
    if scores.peaks is None:
        return scores.values
    one_query = zip(scores.values.unbind(3), scores.peaks.unbind(3), strict=True)
    return torch.cat([PageScores(v.unsqueeze(3), p.unsqueeze(3)).last_row(lengths) for v, p in one_query], dim=3)


def assert_near(found: Tensor, expected: Tensor, share: float, size: float | None = None) -> None:
    """Within `share` of the largest expected number, or of `size`."""
    finite = expected != -torch.inf
    assert torch.equal(found == -torch.inf, ~finite)
    if finite.any():
        assert (found - expected)[finite].abs().max() <= share * (size or expected[finite].abs().max()) + 1e-7


def assert_rounded(scores: PageScores, lengths: Tensor, expected: Tensor) -> None:
    """Float16 scores are near float32 ones: the nearer to their group's largest, the closer."""
    assert scores.peaks is not None
    found, seen = absolute_scores(scores, lengths), expected > -torch.inf
    assert torch.equal(found > -torch.inf, seen)
    groups = expected.unflatten(-1, (scores.peaks.shape[-1], -1))
    below = (groups.amax(-1, keepdim=True) - groups).flatten(-2)
    assert ((found - expected).abs() <= HALF * below + 1e-4 * expected[seen].abs().max() + 1e-6)[seen].all()


def assert_selected(
    found: Tensor, scores: Tensor, rest: Tensor, lengths: Sequence[int], top_k: TopK, rtol: float = 2e-2, atol: float = 1e-9
) -> None:
    """Ascending, in range, and as probable as the true top k, but for what rounding may exchange.

    By default that of 16-bit models: 8 bits behind the exponent, and scores of 11.
    """
    expected = torch_ops.select(scores, rest, lengths, top_k)
    assert torch.equal(found >= 0, expected >= 0)
    for b, length in enumerate(lengths):
        chosen = found[b, ..., : top_k.of(length)]
        assert (chosen.diff(dim=-1) > 0).all()
        assert chosen.numel() == 0 or (chosen.min() >= 0 and chosen.max() < length)
    mean_prob = torch_ops.mean_probabilities(scores, rest)
    sizes = [mean_prob.gather(-1, p.clamp(min=0)).where(p >= 0, 0.0).sort(-1).values for p in (found, expected)]
    torch.testing.assert_close(*sizes, rtol=rtol, atol=atol)
