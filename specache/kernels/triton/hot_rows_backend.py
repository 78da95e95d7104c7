"""Launches of the kernels that look up, claim and fill a hot set. Nothing here waits for the device."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from specache.kernels.triton import hot_rows
from specache.kernels.triton import launch_options as options
from specache.kernels.triton.backend import on_its_device


class HotSetBuffers(Protocol):
    """`specache.device.device_hot_set.DeviceHotSet`, which says what they are."""

    rows: Tensor
    table: Tensor
    owner: Tensor
    used: Tensor
    tick: Tensor
    capacity: int
    tokens: int


class HotRowKernels:
    """For a batch's layer: positions, slots int64 [B, Hkv, k], rows [B, Hkv, k, 2 D]; all but the positions contiguous.

    Args:
        block: slots that a program looks at at a time.
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
        """Look positions up, and give slots to those that are not here.

        Args:
            missing, claimed: filled: the positions that must be read, -1 elsewhere, and their slots.
            victims: scratch, as the two before.
            totals: int64 [3], see `RowCounters`.
            found, wanted: filled: slots of what is here, and the positions once more. Without them the hot set's next tick begins,
                and what finds no slot is not missing: the positions are read ahead.
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
                missing if found is None else found,  # unused where it is ahead
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
    def look(self, positions: Tensor, hot: HotSetBuffers, out: Tensor, here: Tensor) -> None:
        """Into `out` the rows of the positions that are here, else zeros; into `here` those positions, else -1."""
        positions = _of_heads(positions)
        batch, heads, k = positions.shape
        if k:
            settings = options.hot_rows(out.shape[-1])
            hot_rows.look_kernel[(-(-k // settings["BLOCK"]), batch * heads)](
                positions,
                hot.table,
                hot.used,
                hot.tick,
                hot.rows,
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
        """`fill` with the rows where they lie: at addresses int64 [B], with the strides of `like` [Hkv, capacity, 2 D]."""
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
        """The missing rows, `fetched` at their places, go into their slots, and into `out` beside those that were found."""
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
            settings = options.hot_rows(hot.rows.shape[-1])
            hot_rows.fill_kernel[(-(-k // settings["BLOCK"]), batch * heads)](
                source,
                *(strides or (0, 0)),
                missing,
                claimed,
                claimed if found is None else found,
                hot.rows,
                hot.rows if out is None else out,
                k,
                heads,
                hot.capacity,
                MAPPED=strides is not None,
                JOIN=out is not None,
                **settings,
            )


def _of_heads(positions: Tensor) -> Tensor:
    """Positions [B, Hkv, k], each head's in one piece, heads at one distance: as a row of a selection [B, Hkv, n, k] lies."""
    regular = positions.stride(2) == 1 and positions.stride(0) == positions.shape[1] * positions.stride(1)
    return positions if regular else positions.contiguous()
