"""`DeviceRows` whose part of a step is five launches of Triton kernels per layer, instead of some 110 operations of PyTorch."""

from __future__ import annotations

from torch import Tensor

from specache.config import ReadPath
from specache.device.device_hot_set import DeviceHotSet
from specache.device.device_rows import DeviceRows, RowCounters, StepBuffers
from specache.device.sources import MappedRows, RowSource
from specache.kernels import triton as triton_kernels
from specache.tiers.streams import Streams


class FusedRows(DeviceRows):
    """The same rows, slots and numbers as `DeviceRows`, on CUDA or in Triton's interpreter."""

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

    def _ask(self, positions: Tensor) -> None:
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

    def _bring(self) -> None:
        buffers = self._buffers
        self._kernels.fill_mapped(
            self._mapped.addresses, self._mapped.like, self.hot, buffers.missing, buffers.slots, buffers.found, buffers.rows[0]
        )

    def _take(self) -> None:
        buffers = self._buffers
        self._kernels.fill(buffers.fetched, self.hot, buffers.missing, buffers.slots, buffers.found, buffers.rows[0])

    def _look(self, positions: Tensor) -> None:
        self._kernels.look(positions, self.hot, self._buffers.rows[-1], self._buffers.positions[-1])

    def _claim(self, positions: Tensor) -> None:
        self._kernels.claim(positions, self.hot, self._ahead, self._ahead_slots, self._buffers.victims, self._counters.totals)

    def _read_ahead(self) -> None:
        self._kernels.fill_mapped(self._mapped.addresses, self._mapped.like, self.hot, self._ahead, self._ahead_slots)


def device_rows(
    source: RowSource, hot: DeviceHotSet, buffers: StepBuffers, streams: Streams, counters: RowCounters, read: ReadPath
) -> DeviceRows:
    """The rows of a layer of a batch, by the kernels that can read their source."""
    if isinstance(source, MappedRows):
        return FusedRows(source, hot, buffers, streams, counters, read)
    return DeviceRows(source, hot, buffers, streams, counters, read)
