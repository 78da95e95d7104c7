"""Launch the Triton kernels, with the signatures of `kernels.dispatch`, without waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from specache.config import PAGE_TOKENS, Code
from specache.kernels.torch.rotated import levels, rotation
from specache.kernels.triton import attend, gather, quantise, score
from specache.kernels.triton import launch_options as options
from specache.kernels.triton.launch_options import Shape
from specache.kernels.triton.select_backend import launch_select
from specache.kernels.triton.tables import Offsets, PageScores, PageTables, offsets_of, page_tables, to_device
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
        with _on_device(next(x for x in args if isinstance(x, Tensor))):
            return launch(*args, **kwargs)

    return guarded


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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
        tables = page_tables([low_bit_kv], [low_bit_kv.length], keys.device)
        offsets, shape = offsets_of([low_bit_kv]), Shape.of(low_bit_kv)
        if not shape.rotated:
            self._quantise_kivi(keys, values, tables, offsets, shape, start)
            return
        assert low_bit_kv.channel_scales is not None, "the rotated code needs the layer's key scales"
        channel_scales, done, n = low_bit_kv.channel_scales.contiguous(), 0, keys.shape[1]
        while done < n:  # whole pages, except for the first and the last piece
            count = min(n - done, options.QUANTISE_TOKENS - (start + done) % PAGE_TOKENS)
            piece = slice(done, done + count)
            self._quantise_rotated(keys[:, piece], values[:, piece], channel_scales, tables, offsets, shape, start + done)
            done += count

    def score(
        self, query: Tensor, low_bit_kvs: Sequence[LowBitKV], lengths: Sequence[int], scaling: float, softcap: float | None
    ) -> Tensor:
        low_bit_kv, size = low_bit_kvs[0], max(lengths)
        tables = page_tables(low_bit_kvs, lengths, query.device)
        rotated_query = rotate_query(query, low_bit_kvs) if Shape.of(low_bit_kv).rotated else None
        return self.score_pages(query, rotated_query, tables, offsets_of(low_bit_kvs), low_bit_kv, size, scaling, softcap).values

    @on_its_device
    def score_pages(
        self,
        query: Tensor,
        rotated_query: Tensor | None,
        tables: PageTables,
        offsets: Offsets,
        low_bit_kv: LowBitKV,
        capacity: int,
        scaling: float,
        softcap: float | None,
        half: bool = False,
    ) -> PageScores:
        """`score` over page tables on the device, for up to `capacity` tokens.

        Args:
            rotated_query: the result of `rotate_query`, for the rotated code.
            low_bit_kv: any of the batch; only its layout is used.
            half: whether scores are float16, which requires a capacity of whole groups.
        """
        batch, num_heads, n, _ = query.shape
        heads = low_bit_kv.num_kv_heads
        shape = Shape.of(low_bit_kv, num_heads // heads, n)
        query = query.contiguous()
        lines = (batch, heads, shape.groups, n)
        values = torch.empty(*lines, capacity, dtype=torch.float16 if half else torch.float32, device=query.device)
        scores = PageScores(values)
        if half:
            scores.peaks, scores.totals = torch.empty(2, *lines, capacity // shape.group_size, device=query.device)
        if values.numel():
            settings = options.score(shape, softcap is not None, query.dtype == torch.float32, half)
            score.score_kernel[(-(-capacity // settings["BLOCK"]), heads * settings["ROW_BLOCKS"], batch)](
                query,
                query if rotated_query is None else rotated_query,
                tables.addresses,
                tables.first_page,
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

    def rescore(
        self, query: Tensor, scores: Tensor, positions: Tensor, kv_rows: Tensor, scaling: float, softcap: float | None
    ) -> None:
        self.rescore_pages(query, PageScores(scores), positions, kv_rows, scaling, softcap)

    @on_its_device
    def rescore_pages(
        self, query: Tensor, scores: PageScores, positions: Tensor, kv_rows: Tensor, scaling: float, softcap: float | None
    ) -> None:
        """`rescore` of `PageScores`. Beside float16 scores, exact ones are kept in float32."""
        batch, heads, groups, n, size = scores.values.shape
        k, dim = positions.shape[-1], query.shape[-1]
        if not positions.numel():
            return
        query, positions, kv_rows = query.contiguous(), positions.contiguous(), _last_contiguous(kv_rows)
        values, group_size = scores.values, 0
        if scores.peaks is not None:
            group_size = size // scores.peaks.shape[-1]
            scores.exact = torch.empty(batch, heads, groups, n, k, device=query.device)
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

    def select(self, scores: Tensor, rest_lse: Tensor, lengths: Sequence[int], k: int) -> Tensor:
        return self.select_pages(PageScores(scores), rest_lse, to_device(lengths, torch.int32, scores.device), k)

    def select_pages(self, scores: PageScores, rest_lse: Tensor, lengths: Tensor, k: int) -> Tensor:
        """`select` with lengths int32 [B] on the device.

        For float16 scores, probabilities are compared by their upper 16 bits.
        """
        with _on_device(rest_lse):
            return launch_select(scores, rest_lse, lengths, k, self.select_block)

    def attend(
        self, scores: Tensor, positions: Tensor, kv_rows: Tensor, low_bit_kvs: Sequence[LowBitKV], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        tables = page_tables(low_bit_kvs, lengths, scores.device)
        return self.attend_pages(PageScores(scores), positions, kv_rows, tables, offsets_of(low_bit_kvs), low_bit_kvs[0])

    @on_its_device
    def attend_pages(
        self, scores: PageScores, positions: Tensor, kv_rows: Tensor, tables: PageTables, offsets: Offsets, low_bit_kv: LowBitKV
    ) -> tuple[Tensor, Tensor]:
        """`attend` over page tables on the device.

        Args:
            low_bit_kv: any of the batch; only its layout is used.
        """
        values = scores.values
        batch, heads, groups, n, size = values.shape
        shape, device, k = Shape.of(low_bit_kv, groups, n), values.device, positions.shape[-1]
        splits = -(-size // self.split)
        has_fetched = positions.numel() > 0
        parts, dim = splits + has_fetched, shape.dim
        out = torch.empty(batch, heads, groups, n, dim, device=device)
        lse = torch.empty(batch, heads, groups, n, device=device)
        if size == 0:
            return out.zero_(), lse.fill_(-torch.inf)
        assert values.is_contiguous()
        low_bit = torch.empty_like(out) if shape.rotated else out
        fetched_sums = torch.empty_like(out) if has_fetched else out
        sums = torch.empty(batch, heads, splits, groups * n, dim, device=device)
        stats = torch.empty(2, batch, heads, groups * n, parts, device=device)
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
        settings = options.attend_low_bit(shape, kv_rows.dtype == torch.float32, self.split, scores.is_half)
        attend.low_bit_kernel[(splits, heads * settings["ROW_BLOCKS"], batch)](
            values,
            values if scores.peaks is None else scores.peaks,
            tables.addresses,
            tables.first_page,
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

    def gather(self, stored: Sequence[Tensor], positions: Tensor) -> Tensor:
        """Gather rows by positions [B, Hkv, n, k].

        Args:
            stored: the rows [Hkv, capacity, 2 D] of each sequence, on the device or in pinned
                memory.

        Returns:
            [B, Hkv, n, k, 2 D] on the positions' device, zeros at -1.
        """
        addresses = to_device([kv_rows.data_ptr() for kv_rows in stored], torch.int64, positions.device)
        return self.gather_at(addresses, stored[0], positions)

    @on_its_device
    def gather_at(self, addresses: Tensor, like: Tensor, positions: Tensor) -> Tensor:
        """`gather` from addresses int64 [B] on the device.

        Args:
            like: [Hkv, capacity, 2 D] with the dtype and strides of the rows at the addresses.
        """
        batch, heads, n, k = positions.shape
        width = like.shape[-1]
        out = torch.empty(batch, heads, n, k, width, dtype=like.dtype, device=positions.device)
        if out.numel():
            assert like.stride(-1) == 1
            settings = options.gather(width)
            gather.gather_kernel[(-(-n * k // settings["BLOCK"]), batch * heads)](
                addresses,
                *like.stride()[:2],
                positions.contiguous(),
                out,
                n * k,
                heads,
                **settings,
            )
        return out

    def _quantise_kivi(self, keys: Tensor, values: Tensor, tables: PageTables, offsets: Offsets, shape: Shape, start: int) -> None:
        heads, n, dim = keys.shape
        quantise.kivi_keys_kernel[(n // shape.group_size, heads)](
            keys,
            tables.addresses,
            start,
            *keys.stride(),
            offsets.key_codes,
            offsets.key_scale,
            offsets.key_zero,
            **options.kivi_keys(shape),
        )
        settings = options.kivi_values(shape)
        quantise.kivi_values_kernel[(_pages(start, n), heads, -(-dim // settings["GROUP"]))](
            values,
            tables.addresses,
            start,
            n,
            *values.stride(),
            offsets.value_codes,
            offsets.value_scale,
            offsets.value_zero,
            **settings,
        )

    def _quantise_rotated(
        self, keys: Tensor, values: Tensor, channel_scales: Tensor, tables: PageTables, offsets: Offsets, shape: Shape, start: int
    ) -> None:
        heads, n, dim = keys.shape
        turn, levels_ = rotation(dim, keys.device).T, levels(shape.bits, keys.device)
        centred = torch.empty(heads, n, dim, device=keys.device)
        quantise.centre_keys_kernel[(n // shape.group_size, heads)](
            keys,
            channel_scales,
            centred,
            tables.addresses,
            start,
            *keys.stride(),
            offsets.key_mean,
            **options.centre_keys(shape),
        )
        settings = options.rotated_keys(shape)
        quantise.rotated_keys_kernel[(n // settings["TOKENS"], heads)](
            centred @ turn, levels_, tables.addresses, start, n, offsets.key_codes, offsets.key_scale, **settings
        )
        quantise.rotated_values_kernel[(_pages(start, n), heads)](
            values.float() @ turn,
            levels_,
            tables.addresses,
            start,
            n,
            offsets.value_codes,
            offsets.value_scale,
            **options.rotated_values(shape),
        )


def rotate_query(query: Tensor, low_bit_kvs: Sequence[LowBitKV]) -> Tensor:
    """Unscale and rotate the query [B, Hq, n, D] for rotated codes -> float32 [B, Hkv, G n, D]."""
    batch, num_heads, n, dim = query.shape
    heads = low_bit_kvs[0].num_kv_heads
    channel_scales = torch.stack([_channel_scales(low_bit_kv, query.device) for low_bit_kv in low_bit_kvs])  # [B, Hkv, D]
    grouped = query.float().reshape(batch, heads, num_heads // heads * n, dim)
    return (grouped / channel_scales.unsqueeze(2)) @ rotation(dim, query.device).T


def _channel_scales(low_bit_kv: LowBitKV, device: torch.device) -> Tensor:
    if low_bit_kv.channel_scales is None:  # no group is quantised yet
        assert low_bit_kv.length == 0, "the rotated code needs the layer's key scales"
        return torch.ones(low_bit_kv.num_kv_heads, low_bit_kv.head_dim, device=device)
    return low_bit_kv.channel_scales


def _pages(start: int, n: int) -> int:
    """Return the number of pages that tokens `[start, start + n)` are on."""
    return -(-(start + n) // PAGE_TOKENS) - start // PAGE_TOKENS


def _last_contiguous(kv_rows: Tensor) -> Tensor:
    return kv_rows if kv_rows.stride(-1) == 1 else kv_rows.contiguous()
