"""Tensors in an immutable safetensors file, written one at a time to save memory.

A file is identified by size and digest (`StoredFile`). Reading verifies both, then the header, then
that the file holds exactly the expected tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specache.errors import SessionError
from specache.sessions.files import DAMAGED, PrivateFile, StoredFile, check_file

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int64: "I64",
}
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is expected, or to be written (`make` is called when its turn comes)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_snapshot(path: Path, tensors: Mapping[str, TensorSpec]) -> StoredFile:
    """Write a new safetensors file and sync it.

    Raises:
        OSError: the file cannot be written; it is removed.
    """
    header: dict[str, object] = {}
    offset = 0
    for name, spec in tensors.items():
        header[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with PrivateFile(path) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for spec in tensors.values():
                assert spec.make is not None
                file.write(spec.make().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            return file.finish()
    except OSError:
        path.unlink(missing_ok=True)
        raise


class Snapshot:
    """The tensors of a safetensors file, read one at a time.

    Args:
        expected: all tensors that the file must hold.

    Raises:
        SessionError: the file is damaged, or holds other tensors.
    """

    def __init__(self, path: Path, file: StoredFile, expected: Mapping[str, TensorSpec]) -> None:
        check_file(path, file)
        self._path = path
        self._expected = expected
        try:
            with safe_open(str(path), framework="pt") as opened:
                found = {name: self._described(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            raise SessionError(f"{path} is no safetensors file that can be read: {error}. {DAMAGED}") from error
        wanted = {name: (_DTYPES[spec.dtype], spec.shape) for name, spec in expected.items()}
        if found != wanted:
            name = next(name for name in (*wanted, *found) if found.get(name) != wanted.get(name))
            raise SessionError(f"{path}: tensor {name[:100]!r} should be {wanted.get(name)}, and is {found.get(name)}. {DAMAGED}")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return some of the tensors, by name.

        Raises:
            SessionError: the file cannot be read.
        """
        try:
            with safe_open(str(self._path), framework="pt") as opened:
                return {name: opened.get_tensor(name).clone() for name in names}
        except (SafetensorError, OSError) as error:
            raise SessionError(f"{self._path} cannot be read: {error}. {DAMAGED}") from error

    @staticmethod
    def _described(tensor: Any) -> tuple[str, tuple[int, ...]]:
        return tensor.get_dtype(), tuple(tensor.get_shape())
