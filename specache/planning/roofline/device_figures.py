"""Describe a device to the roofline: its figures, their sources, and the share of them that is
reached.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

GIB = 2**30
LINKS = {  # one direction of 16 lanes: transfers per second x 16 / 8, less the line code
    "PCIe 3.0 x16": "PCI Express base specification 3.0: 8 GT/s, 16 lanes, 128b/130b",
    "PCIe 4.0 x16": "PCI Express base specification 4.0: 16 GT/s, 16 lanes, 128b/130b",
    "PCIe 5.0 x16": "PCI Express base specification 5.0: 32 GT/s, 16 lanes, 128b/130b",
}


@dataclass(frozen=True)
class Efficiency:
    """Achieved share of each figure.

    The defaults are what good kernels commonly reach; none was measured or fitted here.

    Attributes:
        memory: share of the memory bandwidth.
        matrix: share of the matrix units' rate.
        vector: share of the vector units' rate.
        link: share of the host link's bandwidth, for pairs gathered from pinned memory.
        usable_memory: share of the memory; the driver, libraries and the allocator take the rest.
    """

    memory: float = 0.85
    matrix: float = 0.7
    vector: float = 0.7
    link: float = 0.8
    usable_memory: float = 0.9


@dataclass(frozen=True)
class Device:
    """The figures of one device.

    Attributes:
        key: name on the command line, or the file that describes the device.
        name: the vendor's product name.
        memory_gib: fast memory, in GiB.
        memory_gb_per_s: bandwidth of the fast memory, in 10^9 bytes per second.
        matrix_tflops: dense products of 16-bit matrices, in 10^12 operations per second (a
            multiply-add is two).
        vector_tflops: float32 arithmetic outside the matrix units, in 10^12 operations per second.
        link_gb_per_s: bandwidth from main memory, in one direction, in 10^9 bytes per second.
        link: kind of link, a key of `LINKS`.
        source: source of the figures that `sources` does not name.
        sources: figure -> its source.
        host_memory_gib: main memory for the slow tier, in GiB; None is unlimited.
        disk_gb_per_s: bandwidth of the disk, for the slow tier `disk`; None if unknown.
        kind: `gpu`, or `cpu`, whose fast memory is main memory.
    """

    key: str
    name: str
    memory_gib: float
    memory_gb_per_s: float
    matrix_tflops: float
    vector_tflops: float
    link_gb_per_s: float
    link: str = ""
    source: str = ""
    sources: dict[str, str] = field(default_factory=dict, hash=False)
    host_memory_gib: float | None = None
    disk_gb_per_s: float | None = None
    kind: str = "gpu"
    efficiency: Efficiency = Efficiency()

    @property
    def usable_bytes(self) -> int:
        """Return the fast memory available to weights, cache and passes, in bytes."""
        return int(self.memory_gib * GIB * self.efficiency.usable_memory)

    @property
    def memory_rate(self) -> float:
        """Return the achieved memory bandwidth, in bytes per second."""
        return self.memory_gb_per_s * 1e9 * self.efficiency.memory

    @property
    def matrix_rate(self) -> float:
        """Return the achieved rate of the matrix units, in operations per second."""
        return self.matrix_tflops * 1e12 * self.efficiency.matrix

    @property
    def vector_rate(self) -> float:
        """Return the achieved vector instructions per second and lane.

        A multiply-add is one instruction, two operations.
        """
        return self.vector_tflops * 1e12 * self.efficiency.vector / 2

    @property
    def link_rate(self) -> float:
        """Return the achieved bandwidth of the host link, in bytes per second."""
        return self.link_gb_per_s * 1e9 * self.efficiency.link

    def source_of(self, figure: str) -> str:
        """Return the source of a figure."""
        if figure == "link_gb_per_s" and figure not in self.sources:
            return LINKS.get(self.link, self.source)
        return self.sources.get(figure, self.source)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON.

        Keys are stable and match a `--gpu-spec` file; `sources` has every figure's.
        """
        values = asdict(self)
        values["sources"] = {figure: self.source_of(figure) for figure in FIGURES if values[figure] is not None}
        return values


FIGURES = tuple(
    one.name for one in fields(Device) if one.name.endswith(("_gib", "_gb_per_s", "_tflops"))
)  # numeric fields; their names end with the unit
