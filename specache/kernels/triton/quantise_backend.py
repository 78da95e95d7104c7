"""Launch the kernels that quantise tokens into pages, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from specache.config import PAGE_TOKENS
from specache.kernels.torch.rotated import levels, rotation
from specache.kernels.triton import launch_options as options
from specache.kernels.triton import quantise
from specache.kernels.triton.launch_options import Shape
from specache.kernels.triton.tables import Offsets, offsets_of
from specache.kernels.types import LowBitKV


def launch_quantise(keys: Tensor, values: Tensor, low_bit_kv: LowBitKV, start: int) -> None:
    """Quantise tokens `[start, start + n)`, whole groups, from keys and values [Hkv, n, D]."""
    addresses = torch.cat([run.device_addresses for run in low_bit_kv.runs])
    offsets, shape = offsets_of(low_bit_kv), Shape.of(low_bit_kv)
    if not shape.rotated:
        _quantise_kivi(keys, values, addresses, offsets, shape, start)
        return
    assert low_bit_kv.channel_scales is not None, "the rotated code needs the layer's key scales"
    channel_scales, done, n = low_bit_kv.channel_scales.contiguous(), 0, keys.shape[1]
    while done < n:  # whole pages, except for the first and the last piece
        count = min(n - done, options.QUANTISE_TOKENS - (start + done) % PAGE_TOKENS)
        piece = slice(done, done + count)
        _quantise_rotated(keys[:, piece], values[:, piece], channel_scales, addresses, offsets, shape, start + done)
        done += count


def _quantise_kivi(keys: Tensor, values: Tensor, addresses: Tensor, offsets: Offsets, shape: Shape, start: int) -> None:
    heads, n, dim = keys.shape
    quantise.kivi_keys_kernel[(n // shape.group_size, heads)](
        keys,
        addresses,
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
        addresses,
        start,
        n,
        *values.stride(),
        offsets.value_codes,
        offsets.value_scale,
        offsets.value_zero,
        **settings,
    )


def _quantise_rotated(
    keys: Tensor, values: Tensor, channel_scales: Tensor, addresses: Tensor, offsets: Offsets, shape: Shape, start: int
) -> None:
    heads, n, dim = keys.shape
    turn, levels_ = rotation(dim, keys.device).T, levels(shape.bits, keys.device)
    centred = torch.empty(heads, n, dim, dtype=torch.float32, device=keys.device)
    quantise.centre_keys_kernel[(n // shape.group_size, heads)](
        keys,
        channel_scales,
        centred,
        addresses,
        start,
        *keys.stride(),
        offsets.key_mean,
        **options.centre_keys(shape),
    )
    settings = options.rotated_keys(shape)
    quantise.rotated_keys_kernel[(n // settings["TOKENS"], heads)](
        centred @ turn, levels_, addresses, start, n, offsets.key_codes, offsets.key_scale, **settings
    )
    quantise.rotated_values_kernel[(_pages(start, n), heads)](
        values.float() @ turn,
        levels_,
        addresses,
        start,
        n,
        offsets.value_codes,
        offsets.value_scale,
        **options.rotated_values(shape),
    )


def _pages(start: int, n: int) -> int:
    """Return the number of pages that tokens `[start, start + n)` are on."""
    return -(-(start + n) // PAGE_TOKENS) - start // PAGE_TOKENS
