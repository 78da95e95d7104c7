"""Window checkpoints in files: copies of sliding windows at earlier lengths.

A window cannot be truncated like rows.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from specache.cache.window_checkpoints import PendingWindows, Spacing, WindowCheckpoints
from specache.cache.window_layer import WindowLayer
from specache.errors import SessionError
from specache.sessions.files import StoredFile
from specache.sessions.manifest import Checkpoint, Manifest
from specache.sessions.snapshot import DTYPE_NAMES, Snapshot, TensorSpec, write_snapshot
from specache.tiers.disk.system_errors import reason


class DiskCheckpoints(WindowCheckpoints):
    """The checkpoints of one session's sequence.

    They become part of the session with the next save.

    Args:
        spacing: spacing for the model's windows.
        folder: the session's folder.
        manifest: the state that was opened, if any.
    """

    def __init__(self, spacing: Spacing, folder: Path, manifest: Manifest | None) -> None:
        super().__init__(spacing)
        self._folder = folder
        self.kept: list[Checkpoint] = list(manifest.checkpoints) if manifest else []
        self.files: dict[str, StoredFile] = {one.file: manifest.files[one.file] for one in self.kept} if manifest else {}
        self._specs = ring_specs(manifest) if manifest else {}

    @property
    def lengths(self) -> list[int]:
        return [one.tokens for one in self.kept]

    @property
    def nbytes(self) -> int:
        return sum(self.files[one.file].bytes for one in self.kept)

    def add(self, length: int, rings: Mapping[int, Tensor], layers: Mapping[int, WindowLayer]) -> None:
        """Write a checkpoint of `length` tokens: rings and sliding layers by layer number.

        Raises:
            SessionError: the file cannot be written.
        """
        windows = PendingWindows()
        for index, ring in rings.items():
            windows.add(layers[index], ring, ())
        self._keep(length, windows)

    def rings(self, length: int) -> dict[int, Tensor]:
        """Return the rings of the checkpoint of exactly `length` tokens.

        Raises:
            SessionError: its file is damaged.
        """
        return self._rings(self.lengths.index(length))

    def _keep(self, length: int, windows: PendingWindows) -> None:
        """Write the windows of the first `length` tokens.

        Raises:
            SessionError: the file cannot be written.
        """
        name = f"windows-{secrets.token_hex(8)}.safetensors"
        rings = {f"ring.{index}": windows.full_ring(index) for index in sorted(windows.rings)}
        specs = {key: TensorSpec.of(ring) for key, ring in rings.items()}
        try:
            self.files[name] = write_snapshot(self._folder / name, specs)
        except OSError as error:
            raise SessionError(
                f"A checkpoint of the sliding windows cannot be written to {self._folder}: {reason(error)}"
            ) from error
        self._specs = {key: TensorSpec(spec.dtype, spec.shape) for key, spec in specs.items()}
        self.kept = sorted([*self.kept, Checkpoint(name, length)], key=lambda one: one.tokens)

    def _rings(self, index: int) -> dict[int, Tensor]:
        found = self.kept[index]
        rings = Snapshot(self._folder / found.file, self.files[found.file], self._specs).read(self._specs)
        return {int(name.partition(".")[2]): ring for name, ring in rings.items()}

    def _drop(self, index: int) -> None:
        """Forget a checkpoint.

        Its file is removed with the next save, since the saved state may refer to it.
        """
        del self.kept[index]


def ring_specs(manifest: Manifest) -> dict[str, TensorSpec]:
    """Return the specs of a window snapshot's tensors."""
    return {
        f"ring.{index}": TensorSpec(DTYPE_NAMES[shape.dtype], (2, shape.heads, shape.window or 0, shape.dim))
        for index, shape in manifest.windows.items()
    }
