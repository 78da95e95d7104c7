"""Launch the kernels that look up, claim and fill a hot set, without waiting for the device."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from specache.kernels.triton import hot_rows
from specache.kernels.triton import launch_options as options
from specache.kernels.triton.backend import on_its_device


class HotSetBuffers(Protocol):
    """The buffers of `specache.device.device_hot_set.DeviceHotSet`, which documents them."""

    kv_rows: Tensor
    table: Tensor
    owner: Tensor
    used: Tensor
    tick: Tensor
    capacity: int
    tokens: int


class HotRowKernels:
    """The hot-set kernels for one layer of a batch.

    Positions and slots are int64 [B, Hkv, k], rows [B, Hkv, k, 2 D]; all but the positions are
    contiguous.

    Args:
        block: slots that a program processes at a time.
    """

    def __init__(self, block: int = options.SLOT_BLOCK) -> None:
        self._block = block

    @on_its_device
    def claim(
        self,
        positions: Tensor,
        hot: HotSetBuffers,
        missing: Tensor,
        claimed: Tensor,
        victims: Tensor,
        totals: Tensor,
        found: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> None:
        """Look positions up, and claim slots for those that are not cached.

        Args:
            missing, claimed: outputs: the positions that must be read, -1 elsewhere, and their
                slots.
            victims: scratch memory of the same shape.
            totals: int64 [3], see `RowCounters`.
            found, wanted: outputs: slots of the cached positions, and a copy of the positions.
                `None` for a prefetch: the hot set's next tick begins, and positions without a slot
                are not read.
        """
        ahead = found is None
        positions = _of_heads(positions)
        batch, heads, k = positions.shape
        if k:
            hot_rows.claim_kernel[(batch * heads,)](
                positions,
                hot.table,
                hot.owner,
                hot.used,
                hot.tick,
                missing if found is None else found,  # unused in a prefetch
                missing,
                claimed,
                missing if wanted is None else wanted,
                victims,
                totals,
                positions.stride(1),
                k,
                hot.capacity,
                hot.tokens,
                **options.claim(ahead, k, self._block),
            )

    @on_its_device
    def lookup(self, positions: Tensor, hot: HotSetBuffers, out: Tensor, here: Tensor) -> None:
        """Copy cached rows into `out` (else zeros) and their positions into `here` (else -1)."""
        positions = _of_heads(positions)
        batch, heads, k = positions.shape
        if k:
            settings = options.hot_rows(out.shape[-1])
            hot_rows.lookup_kernel[(-(-k // settings["BLOCK"]), batch * heads)](
                positions,
                hot.table,
                hot.used,
                hot.tick,
                hot.kv_rows,
                out,
                here,
                positions.stride(1),
                k,
                hot.capacity,
                hot.tokens,
                **settings,
            )

    def fill_mapped(
        self,
        addresses: Tensor,
        like: Tensor,
        hot: HotSetBuffers,
        missing: Tensor,
        claimed: Tensor,
        found: Tensor | None = None,
        out: Tensor | None = None,
    ) -> None:
        """`fill` from rows at addresses int64 [B], strided as `like` [Hkv, capacity, 2 D]."""
        self._fill(addresses, (like.stride(0), like.stride(1)), hot, missing, claimed, found, out)

    def fill(
        self,
        fetched: Tensor,
        hot: HotSetBuffers,
        missing: Tensor,
        claimed: Tensor,
        found: Tensor | None = None,
        out: Tensor | None = None,
    ) -> None:
        """Write missing rows (`fetched`) into their slots, and all rows into `out`."""
        self._fill(fetched, None, hot, missing, claimed, found, out)

    @on_its_device
    def _fill(
        self,
        source: Tensor,
        strides: tuple[int, int] | None,
        hot: HotSetBuffers,
        missing: Tensor,
        claimed: Tensor,
        found: Tensor | None,
        out: Tensor | None,
    ) -> None:
        batch, heads, k = missing.shape
        if k:
            settings = options.hot_rows(hot.kv_rows.shape[-1])
            hot_rows.fill_kernel[(-(-k // settings["BLOCK"]), batch * heads)](
                source,
                *(strides or (0, 0)),
                missing,
                claimed,
                claimed if found is None else found,
                hot.kv_rows,
                hot.kv_rows if out is None else out,
                k,
                heads,
                hot.capacity,
                MAPPED=strides is not None,
                JOIN=out is not None,
                **settings,
            )


def _of_heads(positions: Tensor) -> Tensor:
    """Return positions [B, Hkv, k] with contiguous heads at one distance; copy them only if needed.

    One query's part of a selection [B, Hkv, n, k] has this form.
    """
    regular = positions.stride(2) == 1 and positions.stride(0) == positions.shape[1] * positions.stride(1)
    return positions if regular else positions.contiguous()
