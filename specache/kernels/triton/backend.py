"""Launch the Triton kernels: `quantise`, and those of a static step over page tables.

Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from specache.config import Code, TopK
from specache.kernels.torch.rotated import rotation
from specache.kernels.triton import attend, gather, score
from specache.kernels.triton import launch_options as options
from specache.kernels.triton.launch_options import Shape
from specache.kernels.triton.quantise_backend import launch_quantise
from specache.kernels.triton.select_backend import launch_select
from specache.kernels.triton.tables import Offsets, PageScores, PageTables
from specache.kernels.types import LowBitKV

P = ParamSpec("P")
T = TypeVar("T")
GROUP_SIZES = (16, 32, 64)
MAX_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_its_device(launch: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to launch on its first tensor's device: Triton uses the current one."""

    @wraps(launch)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        tensor = next(x for x in args if isinstance(x, Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            return launch(*args, **kwargs)

    return guarded


class TritonKernels:
    """Kernels for tensors on CUDA (or on the CPU, in Triton's interpreter).

    Args:
        split: tokens of a program of `attend`, whole pages.
        select_block: scores of a program of `select`.
    """

    def __init__(self, split: int = options.SPLIT, select_block: int = options.SELECT_BLOCK) -> None:
        self.split, self.select_block = split, select_block

    @staticmethod
    def unsupported_reason(dim: int, dtype: torch.dtype, group_size: int, code: Code) -> str | None:
        """Return why layers of this kind are unsupported, or `None`."""
        if dim > MAX_DIM:
            return f"head dimension {dim} is above {MAX_DIM}"
        if dtype not in DTYPES:
            return f"{dtype} is none of float32, bfloat16 and float16"
        if group_size not in GROUP_SIZES:
            return f"group size {group_size} is none of 16, 32 and 64"
        if code not in (Code.KIVI, Code.ROTATED):
            return f"there are none for code {code.value!r}"
        return None

    @on_its_device
    def quantise(self, keys: Tensor, values: Tensor, low_bit_kv: LowBitKV, start: int) -> None:
        """Write tokens `[start, start + n)` into the pages, see `specache.kernels.dispatch`."""
        launch_quantise(keys, values, low_bit_kv, start)

    @on_its_device
    def score_pages(
        self,
        query: Tensor,
        tables: PageTables,
        channel_scales: Tensor | None,
        offsets: Offsets,
        low_bit_kv: LowBitKV,
        scaling: float,
        softcap: float | None,
    ) -> PageScores:
        """Score every low-bit key: float32 scores for a float32 query, else float16 ones.

        Args:
            query: [B, Hq, n, D].
            channel_scales: float32 [B, Hkv, D], the key scales of the rotated code.
            low_bit_kv: any of the batch; only its layout is used.
        """
        batch, num_heads, n, _ = query.shape
        heads, capacity, half = low_bit_kv.num_kv_heads, tables.capacity, query.dtype != torch.float32
        shape = Shape.of(low_bit_kv, num_heads // heads, n)
        query = query.contiguous()
        lines = (batch, heads, shape.groups, n)
        values = torch.empty(*lines, capacity, dtype=torch.float16 if half else torch.float32, device=query.device)
        scores = PageScores(values)
        if half:
            scores.peaks, scores.totals = torch.empty(
                2, *lines, capacity // shape.group_size, dtype=torch.float32, device=query.device
            )
        if values.numel():
            settings = options.score(shape, softcap is not None, half)
            score.score_kernel[(-(-capacity // settings["BLOCK"]), heads * settings["ROW_BLOCKS"], batch)](
                query,
                query if channel_scales is None else _rotated(query, channel_scales),
                tables.addresses,
                tables.lengths,
                values,
                values if scores.peaks is None else scores.peaks,
                values if scores.totals is None else scores.totals,
                capacity,
                scaling,
                softcap or 0.0,
                offsets.key_codes,
                offsets.key_scale,
                offsets.key_mean if shape.rotated else offsets.key_zero,
                shape.unit,
                **settings,
            )
        return scores

    @on_its_device
    def rescore_pages(
        self, query: Tensor, scores: PageScores, positions: Tensor, kv_rows: Tensor, scaling: float, softcap: float | None
    ) -> None:
        """Replace the scores of fetched keys by exact ones, kept in float32 beside float16 scores.

        Args:
            positions: int64 [B, Hkv, n, k], -1 where there is no pair.
            kv_rows: [B, Hkv, n, k, 2 D].
        """
        batch, heads, groups, n, size = scores.values.shape
        k, dim = positions.shape[-1], query.shape[-1]
        if not positions.numel():
            return
        query, positions, kv_rows = query.contiguous(), positions.contiguous(), _last_contiguous(kv_rows)
        values, group_size = scores.values, 0
        if scores.peaks is not None:
            group_size = size // scores.peaks.shape[-1]
            scores.exact = torch.empty(batch, heads, groups, n, k, dtype=torch.float32, device=query.device)
        settings = options.rescore(dim, groups, softcap is not None, group_size)
        score.rescore_kernel[(-(-k // settings["BLOCK"]), n, batch * heads)](
            query,
            values,
            values if scores.peaks is None else scores.peaks,
            values if scores.exact is None else scores.exact,
            positions,
            kv_rows,
            size,
            k,
            heads,
            *kv_rows.stride()[:4],
            scaling,
            softcap or 0.0,
            **settings,
        )

    @on_its_device
    def select_pages(self, scores: PageScores, rest_lse: Tensor, lengths: Tensor, top_k: TopK) -> Tensor:
        """Select the largest probabilities -> positions int64 [B, Hkv, n, k of `capacity` tokens].

        For float16 scores, probabilities are compared by their upper 16 bits.

        Args:
            rest_lse: [B, Hkv, G, n], log-sum-exp of the tokens outside the low-bit copy.
            lengths: int32 [B].
        """
        return launch_select(scores, rest_lse, lengths, top_k, self.select_block)

    @on_its_device
    def attend_pages(
        self, scores: PageScores, positions: Tensor, kv_rows: Tensor, tables: PageTables, offsets: Offsets, low_bit_kv: LowBitKV
    ) -> tuple[Tensor, Tensor]:
        """Return (out [B, Hkv, G, n, D], log-sum-exp [B, Hkv, G, n]), float32. Destroys scores.

        Args:
            low_bit_kv: any of the batch; only its layout is used.
        """
        values = scores.values
        batch, heads, groups, n, size = values.shape
        shape, device, k = Shape.of(low_bit_kv, groups, n), values.device, positions.shape[-1]
        splits = -(-size // self.split)
        has_fetched = positions.numel() > 0
        parts, dim = splits + has_fetched, shape.dim
        out = torch.empty(batch, heads, groups, n, dim, dtype=torch.float32, device=device)
        lse = torch.empty(batch, heads, groups, n, dtype=torch.float32, device=device)
        if size == 0:
            return out.zero_(), lse.fill_(-torch.inf)
        assert values.is_contiguous()
        low_bit = torch.empty_like(out) if shape.rotated else out
        fetched_sums = torch.empty_like(out) if has_fetched else out
        sums = torch.empty(batch, heads, splits, groups * n, dim, dtype=torch.float32, device=device)
        stats = torch.empty(2, batch, heads, groups * n, parts, dtype=torch.float32, device=device)
        if has_fetched:
            positions, kv_rows = positions.contiguous(), _last_contiguous(kv_rows)
            attend.fetched_kernel[(n, batch * heads)](
                values,
                values if scores.exact is None else scores.exact,
                positions,
                kv_rows,
                fetched_sums,
                stats[0],
                stats[1],
                size,
                k,
                heads,
                parts,
                *kv_rows.stride()[:4],
                **options.fetched(dim, groups, scores.is_half),
            )
        settings = options.attend_low_bit(shape, scores.is_half, self.split)
        attend.low_bit_kernel[(splits, heads * settings["ROW_BLOCKS"], batch)](
            values,
            values if scores.peaks is None else scores.peaks,
            tables.addresses,
            tables.lengths,
            sums,
            stats[0],
            stats[1],
            size,
            parts,
            offsets.value_codes,
            offsets.value_scale,
            offsets.value_zero,
            shape.unit,
            **settings,
        )
        attend.merge_kernel[(groups * n, batch * heads)](
            sums,
            fetched_sums,
            stats[0],
            stats[1],
            out,
            low_bit,
            lse,
            splits,
            parts,
            **options.merge(shape, parts, has_fetched),
        )
        if shape.rotated:
            out.view(-1, dim).addmm_(low_bit.view(-1, dim), rotation(dim, device))
        return out, lse

    @on_its_device
    def gather_at(self, addresses: Tensor, like: Tensor, positions: Tensor) -> Tensor:
        """Gather rows by positions [B, Hkv, m] -> [B, Hkv, m, 2 D], zeros at -1.

        Args:
            addresses: int64 [B], of each sequence's rows on the device or in pinned memory.
            like: [Hkv, capacity, 2 D] with the dtype and strides of the rows at the addresses.
        """
        batch, heads, m = positions.shape
        width = like.shape[-1]
        out = torch.empty(batch, heads, m, width, dtype=like.dtype, device=positions.device)
        if out.numel():
            assert like.stride(-1) == 1
            settings = options.gather(width)
            gather.gather_kernel[(-(-m // settings["BLOCK"]), batch * heads)](
                addresses,
                *like.stride()[:2],
                positions.contiguous(),
                out,
                m,
                heads,
                **settings,
            )
        return out


def _rotated(query: Tensor, channel_scales: Tensor) -> Tensor:
    """Unscale and rotate the query [B, Hq, n, D] for rotated codes -> float32 [B, Hkv, G n, D]."""
    grouped = query.float().reshape(*channel_scales.shape[:2], -1, query.shape[-1])
    return (grouped / channel_scales.unsqueeze(2)) @ rotation(query.shape[-1], query.device).T


def _last_contiguous(kv_rows: Tensor) -> Tensor:
    return kv_rows if kv_rows.stride(-1) == 1 else kv_rows.contiguous()
