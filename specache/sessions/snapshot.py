"""Tensors in a safetensors file: written one after the other, so that none is held twice; made once and never changed.

A file is known by its size and digest (`StoredFile`). Reading checks both, then what the file says of itself, then that it holds
exactly the tensors that are expected.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specache.errors import SessionError
from specache.tiers import aligned_io
from specache.tiers.row_file import reason

BLOCK = 1 << 20
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int64: "I64",
}
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}
DAMAGED = "It was damaged or replaced since. Use another copy of the session, or remove it and start again from the prompt."


@dataclass(frozen=True)
class StoredFile:
    """A file that never changes: its size, and the BLAKE2b digest of its bytes."""

    bytes: int
    digest: str


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written (`make` is called when its turn comes) or expected."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class PrivateFile:
    """A new file of the user's alone, whose digest is kept as it is written.

    Raises:
        OSError: it cannot be made, written or made safe.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._digest = new_digest()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        aligned_io.write_all(self._fd, memoryview(data), self._size)
        self._digest.update(data)
        self._size += len(data)

    def finish(self) -> StoredFile:
        """Return when it survives a power failure (its name does when the folder is synced)."""
        os.fsync(self._fd)
        return StoredFile(self._size, self._digest.hexdigest())

    def __enter__(self) -> PrivateFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=32)


def write_snapshot(path: Path, tensors: Mapping[str, TensorSpec]) -> StoredFile:
    """Write a new safetensors file and make it safe.

    Raises:
        OSError: it cannot be written; what there is of it is removed.
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


@contextmanager
def plain_file(path: Path) -> Iterator[int]:
    """A descriptor to read a file with, which is reached through no link and is no folder or device.

    Raises:
        OSError: there is no such file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(0, "It is no plain file")
        yield fd
    finally:
        os.close(fd)


def check_file(path: Path, expected: StoredFile) -> None:
    """Refuse a file that is not the one that was written.

    Raises:
        SessionError: it is missing, no plain file, or has another size or content.
    """
    digest = new_digest()
    try:
        with plain_file(path) as fd:
            size = os.fstat(fd).st_size
            if size != expected.bytes:
                raise SessionError(f"{path} has {size:,} bytes, but {expected.bytes:,} were written. {DAMAGED}")
            while block := os.read(fd, BLOCK):
                digest.update(block)
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {reason(error)} {DAMAGED}") from error
    if digest.hexdigest() != expected.digest:
        raise SessionError(f"{path} is not what was written (its digest differs). {DAMAGED}")


class Snapshot:
    """The tensors of a safetensors file, read one at a time.

    Args:
        expected: all that must be in it.

    Raises:
        SessionError: the file is damaged, or holds something else.
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
        """Some of the tensors.

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
