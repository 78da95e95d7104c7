"""Find weights that accelerate keeps elsewhere between passes, and read parts of their files.

A parameter of such a layer is on the `meta` device between passes. The layer's hook maps names to
tensors in main memory or in files. Reading such a map loads a whole tensor, so offsets in files are
looked up here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specache.errors import UsageError

_SAFETENSORS = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64},
    **{"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file: `shape` elements of `stored`, from byte `start` on, loaded as `dtype`."""

    path: str
    start: int
    shape: tuple[int, ...]
    stored: torch.dtype
    dtype: torch.dtype

    def runs(self, starts: list[int], length: int) -> Tensor:
        """Read `length` elements from each start, [starts * length], converted to `dtype`."""
        size = self.stored.itemsize
        with _readable(self.path), open(self.path, "rb", buffering=0) as file:
            data = b"".join(os.pread(file.fileno(), length * size, self.start + start * size) for start in starts)
        if not data:
            return torch.empty(0, dtype=self.dtype)
        return torch.frombuffer(bytearray(data), dtype=self.stored).to(self.dtype)

    def stamp(self) -> tuple[str, int, int, int]:
        """Return values that change when the file is replaced or written to."""
        with _readable(self.path):
            status = os.stat(self.path)
        return (self.path, status.st_ino, status.st_size, status.st_mtime_ns)


def hooks_of(module: Any) -> Iterator[Any]:
    """Yield accelerate's hooks of a module."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def execution_device(model: Any) -> torch.device | None:
    """Return the device of a model with offloaded weights, from the first hook that states one."""
    for module in model.modules():
        for hook in hooks_of(module):
            device = getattr(hook, "execution_device", None)
            if device is not None and str(device) not in ("meta", "disk"):
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None


def kept_elsewhere(module: Any, name: str) -> Tensor | FileTensor | None:
    """Return where a module's hook keeps the tensor `name` (a path below it), or None."""
    for hook in hooks_of(module):
        kept = getattr(hook, "weights_map", None)
        if kept is not None and getattr(hook, "offload", False):
            found = _look_up(kept, name)
            if found is not None:
                return found
    return None


def _look_up(kept: Any, name: str) -> Tensor | FileTensor | None:
    while hasattr(kept, "dataset") and hasattr(kept, "prefix"):
        name, kept = f"{kept.prefix}{name}", kept.dataset
    in_memory = getattr(kept, "state_dict", kept)
    if name in in_memory:
        value = in_memory[name]
        return value if isinstance(value, Tensor) else None
    said = getattr(kept, "index", {}).get(name)
    if said is None:
        return None
    if said.get("safetensors_file") is None:
        dtype = getattr(torch, said["dtype"])  # accelerate writes bfloat16 as int16 with the same bits
        return FileTensor(os.path.join(kept.save_folder, f"{name}.dat"), 0, tuple(said["shape"]), dtype, dtype)
    path = os.fspath(said["safetensors_file"])
    with _readable(path):
        found = _header(path, os.stat(path).st_mtime_ns).get(said.get("weight_name", name))
    if found is None:  # an unknown format: read the whole tensor
        return kept[name]
    start, shape, stored = found
    wanted = getattr(torch, said["dtype"]) if "dtype" in said else stored
    return FileTensor(path, start, shape, stored, wanted)


@lru_cache(maxsize=64)
def _header(path: str, changed: int) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
    """Read a safetensors file's table and return name -> (first byte, shape, dtype).

    `changed`, the file's modification time, is part of the cache key.
    """
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
    found = {}
    for name, said in table.items():
        if name != "__metadata__" and said["dtype"] in _SAFETENSORS:
            found[name] = (8 + length + said["data_offsets"][0], tuple(said["shape"]), _SAFETENSORS[said["dtype"]])
    return found


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Name the missing file of weights in the error if the system refuses a read."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"The model keeps weights in {path}, which cannot be read: {error.strerror or error}. Put the file back, or load the "
            "model again."
        ) from error
