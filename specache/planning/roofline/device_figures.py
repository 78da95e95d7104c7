"""What a roofline knows of a device: its figures, where each of them comes from, and how much of them is reached."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

GIB = 2**30
LINKS = {  # one direction of 16 lanes: transfers per second x 16 / 8, less what the line code takes
    "PCIe 3.0 x16": "PCI Express base specification 3.0: 8 GT/s, 16 lanes, 128b/130b",
    "PCIe 4.0 x16": "PCI Express base specification 4.0: 16 GT/s, 16 lanes, 128b/130b",
    "PCIe 5.0 x16": "PCI Express base specification 5.0: 32 GT/s, 16 lanes, 128b/130b",
}


@dataclass(frozen=True)
class Efficiency:
    """Achieved share of each figure. The defaults are what good kernels commonly reach; none was measured or fitted here.

    Attributes:
        memory: of the memory's bandwidth.
        matrix: of the matrix units' rate.
        vector: of the vector units' rate.
        link: of the host link, for rows gathered from pinned memory.
        usable_memory: of the memory; the rest is the driver's, the libraries' and the allocator's.
    """

    memory: float = 0.85
    matrix: float = 0.7
    vector: float = 0.7
    link: float = 0.8
    usable_memory: float = 0.9


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        key: its name on the command line, or the file that describes it.
        name: as its vendor says it.
        memory_gib: fast memory, in GiB.
        memory_gb_per_s: bandwidth of it, in 10^9 bytes per second.
        matrix_tflops: dense products of 16-bit matrices, in 10^12 operations per second (a multiply-add is two).
        vector_tflops: float32 arithmetic outside the matrix units.
        link_gb_per_s: from main memory, in one direction, in 10^9 bytes per second.
        link: what that is.
        source: where figures come from that `sources` does not name.
        sources: figure -> where it comes from.
        host_memory_gib: main memory for the slow tier; `None` is as much as is needed.
        disk_gb_per_s: of the disk, for the slow tier `disk`; `None` where it is not known.
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
        """Fast memory that weights, cache and passes may take."""
        return int(self.memory_gib * GIB * self.efficiency.usable_memory)

    @property
    def memory_rate(self) -> float:
        """Bytes per second that are reached."""
        return self.memory_gb_per_s * 1e9 * self.efficiency.memory

    @property
    def matrix_rate(self) -> float:
        """Operations per second that are reached."""
        return self.matrix_tflops * 1e12 * self.efficiency.matrix

    @property
    def vector_rate(self) -> float:
        """Vector instructions per second and lane that are reached: a multiply-add is one, and two operations."""
        return self.vector_tflops * 1e12 * self.efficiency.vector / 2

    @property
    def link_rate(self) -> float:
        """Bytes per second that are reached."""
        return self.link_gb_per_s * 1e9 * self.efficiency.link

    def source_of(self, figure: str) -> str:
        """Where a figure comes from."""
        if figure == "link_gb_per_s" and figure not in self.sources:
            return LINKS.get(self.link, self.source)
        return self.sources.get(figure, self.source)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Keys are stable and are those of a `--gpu-spec` file; `sources` names every figure's."""
        values = asdict(self)
        values["sources"] = {figure: self.source_of(figure) for figure in FIGURES if values[figure] is not None}
        return values


FIGURES = tuple(
    one.name for one in fields(Device) if one.name.endswith(("_gib", "_gb_per_s", "_tflops"))
)  # numbers, with their unit in their name
