"""Sliding windows as they were at some lengths of the sequence, in files: a window has no way back, the rows of a cut have."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from specache.errors import SessionError
from specache.sessions.files import StoredFile
from specache.sessions.manifest import Checkpoint, Manifest
from specache.sessions.snapshot import DTYPE_NAMES, Snapshot, TensorSpec, write_snapshot
from specache.tiers.system_errors import reason
from specache.window_layer import WindowLayer

INTERVAL = 4096  # tokens between two checkpoints, at least


class DiskCheckpoints:
    """The checkpoints of one session's sequence. They count with the next save.

    Args:
        folder: the session's.
        manifest: the state that was opened, if any.
    """

    def __init__(self, folder: Path, manifest: Manifest | None) -> None:
        self._folder = folder
        self.kept: list[Checkpoint] = list(manifest.checkpoints) if manifest else []
        self.files: dict[str, StoredFile] = {one.file: manifest.files[one.file] for one in self.kept} if manifest else {}
        self._specs = ring_specs(manifest) if manifest else {}

    def offer(self, length: int, windows: Mapping[int, WindowLayer]) -> None:
        """Keep the windows if the last checkpoint is far behind.

        Raises:
            SessionError: they cannot be written.
        """
        if not windows or length - (self.kept[-1].tokens if self.kept else 0) < INTERVAL:
            return
        name = f"windows-{secrets.token_hex(8)}.safetensors"
        rings = {f"ring.{index}": TensorSpec.of(layer.ring) for index, layer in windows.items()}
        try:
            self.files[name] = write_snapshot(self._folder / name, rings)
        except OSError as error:
            raise SessionError(
                f"A checkpoint of the sliding windows cannot be written to {self._folder}: {reason(error)}"
            ) from error
        self._specs = {key: TensorSpec(spec.dtype, spec.shape) for key, spec in rings.items()}
        self.kept.append(Checkpoint(name, length))

    def newest(self, length: int) -> tuple[int, dict[int, Tensor]] | None:
        """The last checkpoint of at most `length` tokens, and its rings by layer.

        Raises:
            SessionError: its file is damaged.
        """
        found = next((one for one in reversed(self.kept) if one.tokens <= length), None)
        if found is None:
            return None
        rings = Snapshot(self._folder / found.file, self.files[found.file], self._specs).read(self._specs)
        return found.tokens, {int(name.partition(".")[2]): ring for name, ring in rings.items()}

    def forget_after(self, length: int) -> None:
        """Tokens from `length` on are gone, and with them the checkpoints behind."""
        self.kept = [one for one in self.kept if one.tokens <= length]


def ring_specs(manifest: Manifest) -> dict[str, TensorSpec]:
    """The tensors of a snapshot of windows."""
    return {
        f"ring.{index}": TensorSpec(DTYPE_NAMES[shape.dtype], (2, shape.heads, shape.window or 0, shape.dim))
        for index, shape in manifest.windows.items()
    }
