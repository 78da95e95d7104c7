"""Make a long context for llama.cpp without a prefill: repeat the stored rows of a short sequence.

`llama_state_seq_get_data` writes, little-endian:
- magic and sequence (u32 each), number of streams (u32);
- per stream its number of cells and, if not 0, per cell: position, 1, sequence (u32 each);
- whether values are transposed, number of layers (u32 each);
- per layer type (i32), bytes of a row (u64) and rows of the keys; then the same of the values.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from specache.errors import BenchmarkError

_CELL = np.dtype([("position", "<u4"), ("sequences", "<u4"), ("sequence", "<u4")])
_TENSOR = struct.Struct("<iQ")  # type, bytes of a row


@dataclass(frozen=True)
class SequenceState:
    """The stored keys and values of one sequence.

    Attributes:
        head: the bytes before the sequence's own cells: magic, sequence, number of streams, streams
            before it.
        cells: [n], positions 0 to n - 1.
        tensors: the keys of every layer, then the values of every layer: (type, rows uint8 [n,
            bytes of a row]).
        empty_after: number of streams after it, all empty.
    """

    head: bytes
    cells: Any
    tensors: tuple[tuple[int, Any], ...]
    empty_after: int

    @classmethod
    def parse(cls, data: bytes) -> SequenceState:
        """Parse what llama.cpp wrote.

        Raises:
            BenchmarkError: it has another layout, for example that of a sliding window or a
                recurrent model.
        """
        reader = _Reader(data)
        reader.skip(8)
        streams = reader.u32()
        before = 0
        while before < streams and (count := reader.u32()) == 0:
            before += 1
        _expect(before < streams)
        head = data[: reader.at - 4]
        cells = np.frombuffer(reader.take(count * _CELL.itemsize), _CELL)
        _expect(bool((cells["position"] == np.arange(count)).all() and (cells["sequences"] == 1).all()))
        _expect(reader.u32() == 0)  # values are not transposed: flash attention
        layers = reader.u32()
        tensors = tuple(reader.tensor(count) for _ in range(2 * layers))
        empty_after = streams - before - 1
        _expect(all(reader.u32() == 0 for _ in range(empty_after)) and reader.at == len(data))
        return cls(head, cells, tensors, empty_after)

    def extended(self, length: int) -> Any:
        """Return a state of `length` tokens as bytes, uint8 [size]: these rows, repeated."""
        count = len(self.cells)
        cells = np.empty(length, _CELL)
        cells["position"] = np.arange(length)
        cells["sequences"] = 1
        cells["sequence"] = self.cells["sequence"][0]
        layout = struct.pack("<II", 0, len(self.tensors) // 2)
        size = len(self.head) + 4 + cells.nbytes + len(layout) + 4 * self.empty_after
        size += sum(_TENSOR.size + length * rows.shape[1] for _, rows in self.tensors)
        writer = _Writer(size)
        for part in (self.head, struct.pack("<I", length), cells.tobytes(), layout):
            writer.put(np.frombuffer(part, np.uint8))
        for kind, rows in self.tensors:
            writer.put(np.frombuffer(_TENSOR.pack(kind, rows.shape[1]), np.uint8))
            for start in range(0, length, count):
                writer.put(rows[: length - start].reshape(-1))
        writer.put(np.zeros(4 * self.empty_after, np.uint8))
        assert writer.at == size
        return writer.data


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def skip(self, count: int) -> None:
        self.at += count

    def take(self, count: int) -> memoryview:
        _expect(self.at + count <= len(self._data))
        part = memoryview(self._data)[self.at : self.at + count]
        self.at += count
        return part

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def tensor(self, count: int) -> tuple[int, Any]:
        kind, row_bytes = _TENSOR.unpack(self.take(_TENSOR.size))
        return kind, np.frombuffer(self.take(count * row_bytes), np.uint8).reshape(count, row_bytes)


class _Writer:
    def __init__(self, size: int) -> None:
        self.data = np.empty(size, np.uint8)
        self.at = 0

    def put(self, part: Any) -> None:
        self.data[self.at : self.at + len(part)] = part
        self.at += len(part)


def _expect(as_documented: bool) -> None:
    if not as_documented:
        raise BenchmarkError(
            "llama.cpp's stored state is not that of plain attention layers, as this release of it writes it. A model with sliding "
            "windows or other layers cannot be measured; for others try llama-cpp-python 0.3.36."
        )
