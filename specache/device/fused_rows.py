"""A `DeviceRowFetcher` on Triton kernels: five launches per layer and step instead of about 110."""

from __future__ import annotations

from torch import Tensor

from specache.config import ReadPath
from specache.device.device_hot_set import DeviceHotSet
from specache.device.device_rows import DeviceRowFetcher, RowCounters, StepBuffers
from specache.device.sources import MappedRows, RowSource
from specache.kernels import triton as triton_kernels
from specache.tiers.streams import Streams


class FusedRowFetcher(DeviceRowFetcher):
    """Equals `DeviceRowFetcher` in rows, slots and counts. For CUDA and Triton's interpreter."""

    def __init__(
        self,
        source: MappedRows,
        hot: DeviceHotSet,
        buffers: StepBuffers,
        streams: Streams,
        counters: RowCounters,
        read: ReadPath = ReadPath.MAPPED,
    ) -> None:
        super().__init__(source, hot, buffers, streams, counters, read)
        self._mapped = source
        self._kernels = triton_kernels.load_hot_rows()

    def _lookup(self, positions: Tensor) -> None:
        buffers = self._buffers
        self._kernels.claim(
            positions,
            self.hot,
            buffers.missing,
            buffers.slots,
            buffers.victims,
            self._counters.totals,
            found=buffers.found,
            wanted=buffers.positions[0],
        )

    def _fetch_missing(self) -> None:
        buffers = self._buffers
        self._kernels.fill_mapped(
            self._mapped.addresses, self._mapped.like, self.hot, buffers.missing, buffers.slots, buffers.found, buffers.kv_rows[0]
        )

    def _insert(self) -> None:
        buffers = self._buffers
        self._kernels.fill(buffers.fetched, self.hot, buffers.missing, buffers.slots, buffers.found, buffers.kv_rows[0])

    def _lookup_available(self, positions: Tensor) -> None:
        self._kernels.lookup(positions, self.hot, self._buffers.kv_rows[-1], self._buffers.positions[-1])

    def _reserve_ahead(self, positions: Tensor) -> None:
        self._kernels.claim(positions, self.hot, self._ahead, self._ahead_slots, self._buffers.victims, self._counters.totals)

    def _read_ahead(self) -> None:
        self._kernels.fill_mapped(self._mapped.addresses, self._mapped.like, self.hot, self._ahead, self._ahead_slots)


def device_row_fetcher(
    source: RowSource, hot: DeviceHotSet, buffers: StepBuffers, streams: Streams, counters: RowCounters, read: ReadPath
) -> DeviceRowFetcher:
    """Return a layer's row fetcher, with fused kernels if they can read its source."""
    if isinstance(source, MappedRows):
        return FusedRowFetcher(source, hot, buffers, streams, counters, read)
    return DeviceRowFetcher(source, hot, buffers, streams, counters, read)
