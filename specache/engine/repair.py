"""Repair of a session: damaged parts are made again from its tokens, intact parts are kept.

    rows        prefill the blocks with a damaged row again, over the intact rows before them pages
    quantise the rows again tail        prefill the last tokens again, from the last complete block
    (in a hybrid model: from a
                checkpoint of its sliding windows)
    windows     drop the checkpoint
    tokens      copy them from the tail, or the tail's from their copy
    manifest    restore it from its copy, or the copy from it

Files of the saved state are never changed and the manifest is written last, so a crash leaves the
session as it was.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specache.cache.compressed_layer import CompressedLayer
from specache.cache.sequence import Sequence
from specache.cache.window_checkpoints import Spacing
from specache.cache.window_layer import WindowLayer
from specache.config import SpeCacheConfig
from specache.engine.generate import prefill
from specache.engine.reread import Rereader
from specache.errors import SessionError
from specache.low_bit.key_scales import KeyScales
from specache.sessions import names, state
from specache.sessions.checkpoints import DiskCheckpoints
from specache.sessions.damage import Damage, Inspection, inspect
from specache.sessions.lock import FolderLock
from specache.sessions.manifest import Manifest
from specache.sessions.manifest_file import check_ours, write_manifest
from specache.sessions.row_blocks import write_mended
from specache.sessions.schema import is_data_file
from specache.sessions.session import Session
from specache.sessions.snapshot import DTYPE_NAMES, Snapshot, TensorSpec, write_snapshot
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.disk.row_file import new_segment
from specache.tiers.disk.row_layout import BLOCK_TOKENS
from specache.tiers.disk.system_errors import reason

NEEDS_MODEL = {"rows", "pages", "tail"}  # kinds of damage whose repair runs the model
Progress = Callable[[int], None]  # tokens read again so far


@dataclass(frozen=True)
class RepairReport:
    """The damage of a session, and its repair.

    Attributes:
        tokens: the number of tokens in the session.
        damages: the damage before the repair.
        tokens_read: tokens that were prefilled again.
        mended: whether there was damage that is now repaired.
    """

    name: str
    folder: str
    tokens: int
    damages: tuple[Damage, ...]
    tokens_read: int = 0
    mended: bool = False

    @property
    def needs_model(self) -> bool:
        """Return whether the repair needs the model."""
        return any(damage.kind in NEEDS_MODEL for damage in self.damages)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON. Keys are stable."""
        return {**asdict(self), "damages": [asdict(damage) for damage in self.damages], "needs_model": self.needs_model}


def check(name: str, *, folder: str | os.PathLike[str] | None = None) -> RepairReport:
    """Read all files of a session and report the damage. This changes nothing and needs no model.

    Raises:
        SessionError: the session does not exist, is in use or cannot be repaired; the message says
            why.
    """
    path = _existing(name, folder)
    with FolderLock(path):
        return _report(name, path, _mendable(name, inspect(path, name)))


def repair(
    name: str,
    model: Any = None,
    *,
    tokenizer: Any = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> RepairReport:
    """Repair a session: it continues as if it had never been damaged, with prefilled rows.

    Args:
        model: the model that the session was made with. Without it, only damage that needs no
            prefill is repaired.
        tokenizer: if given, a session made with another tokenizer is refused.
        folder: the folder of all sessions; by default `sessions` in the cache folder.
        progress: called with the number of tokens prefilled again so far.

    Raises:
        SessionError: the session does not exist, is in use, belongs to another model or cannot be
            repaired; nothing was changed.
    """
    path = _existing(name, folder)
    with FolderLock(path):
        found = _mendable(name, inspect(path, name))
        report = _report(name, path, found)
        if not report.damages:
            return report
        if not report.needs_model:
            _mend_files(path, found)
            return replace(report, mended=True)
    if model is None:
        raise SessionError(
            f"Mending the session {name!r} takes the model that it was made with, to read tokens again: name it (-m MODEL). "
            "Nothing was changed."
        )
    return _mend_with_model(name, model, tokenizer, path, progress or (lambda done: None))


def _existing(name: str, folder: str | os.PathLike[str] | None) -> Path:
    path = names.existing_folder(names.root_of(name, folder), name)
    check_ours(path)
    return path


def _report(name: str, path: Path, found: Inspection) -> RepairReport:
    return RepairReport(name, str(path), found.manifest.tokens, found.damages)


def _mendable(name: str, found: Inspection) -> Inspection:
    if found.token_ids is None:
        parts = ", ".join(sorted(found.damaged_files))
        why = "their copy too" if found.manifest.token_copy else "this session was saved before copies of them were kept"
        raise SessionError(
            f"The session {name!r} cannot be mended: its tokens are damaged, and {why} ({parts}). Nothing was changed. Use another "
            "copy of the session, or remove it and start again from the prompt."
        )
    return found


def _intact(manifest: Manifest, found: Inspection) -> Manifest:
    """Return the manifest without damaged checkpoints."""
    kept = tuple(one for one in manifest.checkpoints if one.file not in found.damaged_files)
    return _listed(replace(manifest, checkpoints=kept))


def _listed(manifest: Manifest) -> Manifest:
    """Return the manifest with exactly the files that it refers to."""
    return replace(manifest, files={name: manifest.files[name] for name in sorted(manifest.snapshots())})


def _mend_files(path: Path, found: Inspection) -> None:
    """Repair damage that needs no model.

    Raises:
        SessionError: the folder cannot be written; the session is unchanged.
    """
    manifest = _intact(found.manifest, found)
    try:
        if "tokens" in found.damaged_kinds:
            tail, specs = state.open_tail(path, manifest), state.token_specs(manifest)
            name = f"tokens-{secrets.token_hex(8)}.safetensors"
            tensors = {key: TensorSpec.of(tensor) for key, tensor in tail.read(specs).items()}
            files = {**manifest.files, name: write_snapshot(path / name, tensors)}
            manifest = _listed(replace(manifest, token_copy=name, files=files))
        write_manifest(path, manifest)
        for file in found.damaged_files - set(manifest.files):
            if is_data_file(file):
                (path / file).unlink(missing_ok=True)
    except OSError as error:
        raise SessionError(f"The session's folder {path} cannot be written: {reason(error)}") from error


def _mend_with_model(name: str, model: Any, tokenizer: Any, path: Path, progress: Progress) -> RepairReport:
    before = set(os.listdir(path))
    manifests = _manifest_bytes(path)
    try:
        session = MendedSession(name, model, tokenizer=tokenizer, folder=path.parent, progress=progress)
        with session:
            report = _report(name, path, session.found)
            read = session.finish(model)
        return replace(report, tokens_read=read, mended=True)
    except BaseException as error:
        with suppress(SessionError), FolderLock(path):  # if it is in use by now, the files may be the user's
            if _manifest_bytes(path) == manifests:  # remove the files of the failed repair
                for file in set(os.listdir(path)) - before:
                    if is_data_file(file):
                        with suppress(OSError):
                            (path / file).unlink()
        if isinstance(error, OSError):
            raise SessionError(f"The session's folder {path} cannot be written: {reason(error)}") from error
        raise


def _manifest_bytes(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(path.glob("session.json*")) if file.is_file()]


class MendedSession(Session):
    """A damaged session, opened with its intact state and repaired by `finish`.

    Attributes:
        found: the damage.
    """

    def __init__(self, name: str, model: Any, *, tokenizer: Any, folder: Path, progress: Progress) -> None:
        self.found: Inspection
        self._model = model
        self._progress = progress
        self._tokens_read = 0
        super().__init__(name, model, tokenizer=tokenizer, folder=folder)

    def finish(self, model: Any) -> int:
        """Prefill the tokens behind the intact state, and save. Return how many ran again."""
        ids, stored = self.found.token_ids or [], len(self.token_ids)
        if stored < len(ids):

            def count(done: int, total: int) -> None:
                self._progress(self._tokens_read + done - stored)

            tokens = torch.tensor([ids], device=self.cache.info.device)
            prefill(model, tokens, cache=self.cache, attention_mask=torch.ones_like(tokens), progress=count)
        state.restore_history(self._sequence, self.found.manifest)
        self.save()
        return self._tokens_read + len(ids) - stored

    def _read_saved(self) -> Manifest | None:
        self.found = _mendable(self.name, inspect(self.folder, self.name))
        return self.found.manifest

    def _config(self, wanted: SpeCacheConfig | None) -> SpeCacheConfig:
        return super()._config(None)

    def _open(self) -> None:
        """Create the cache's sequence from the intact and the repaired state."""
        cache, manifest = self._cache, _intact(self.found.manifest, self.found)
        assert cache is not None
        info = cache.info
        expected = {i: (d.kv_heads, d.head_dim, d.window) for i, d in enumerate(cache.resources.dimensions.layers)}
        state.check_shapes(manifest, expected, info.dtype)
        spacing = Spacing.of([window for window in info.windows if window is not None] or [1])
        self._checkpoints = DiskCheckpoints(spacing, self.folder, manifest)
        if self.found.blocks:
            chunk = cache.config.prefill_chunk
            rereader = Rereader(self._model, info, self.folder, self.found, self._checkpoints, chunk, self._progress)
            manifest = replace(manifest, rows=write_mended(self.folder, manifest, new_segment(), rereader.mended()))
            self._tokens_read = rereader.tokens_read
        sequence = cache.new_sequence()
        cache.sequences = [sequence]
        sequence.tier.close()
        sequence.checkpoints = self._checkpoints
        if self.found.damaged_kinds & {"tail", "pages"}:
            manifest = replace(manifest, pages=())  # all pages are written anew
            self._rebuild(sequence, manifest)
        else:
            tail = state.open_tail(self.folder, manifest)
            sequence.tier = state.open_tier(self.folder, manifest, tail)
            state.restore(sequence, info.device, self.folder, manifest, tail)
        self._saved = manifest

    def _rebuild(self, sequence: Sequence, manifest: Manifest) -> None:
        """Quantise the rows again. Restore the rest from the tail, or else by `_go_back`."""
        tail = None if "tail" in self.found.damaged_kinds else state.open_tail(self.folder, manifest)
        length, stored, rings = (manifest.tokens, manifest.tokens, None) if tail else self._go_back(manifest)
        if length == 0:
            self._checkpoints.forget_after(0)
            sequence.tier = DiskTier(self.folder, temporary=False)
            return
        source = tail or self._token_copy(manifest)
        names = state.tail_specs(manifest) if tail else state.token_specs(manifest)
        tensors = source.read(names)
        empty = {i: torch.empty(s.heads, 0, 2 * s.dim, dtype=DTYPE_NAMES[s.dtype]) for i, s in manifest.full_layers.items()}
        sequence.tier = tier = DiskTier.open(
            self.folder, manifest.rows, {index: tensors.get(f"rows.{index}", rows) for index, rows in empty.items()}
        )
        device = self._cache.info.device if self._cache else torch.device("cpu")
        for index, shape in manifest.layers.items():
            layer = sequence.layer(index, torch.empty(shape.heads, 0, shape.dim, dtype=DTYPE_NAMES[shape.dtype], device=device))
            if isinstance(layer, WindowLayer):
                if rings is None:
                    layer.restore(tensors[f"ring.{index}"], stored, manifest.ring_tokens)
                else:
                    layer.restore(rings[index], stored)
                layer.truncate(length)
            elif isinstance(layer, CompressedLayer):
                tier.truncate(index, length)
                kept = {kind: tensors.get(f"{kind}.{index}") for kind in ("weights", "queries", "wanted")}
                moved = {kind: None if tensor is None else tensor.to(device) for kind, tensor in kept.items()}
                layer.key_scales = KeyScales(layer.key_scales.tokens, moved["weights"], moved["queries"])
                layer.rebuild(length)
                layer.next_positions = moved["wanted"]
        sequence.commit(tensors["token_ids"].tolist()[:length])
        self._checkpoints.forget_after(length)

    def _go_back(self, manifest: Manifest) -> tuple[int, int, dict[int, torch.Tensor] | None]:
        """Return, for a damaged tail, where the prefill must begin.

        Returns:
            Tokens that are kept, the tokens of the windows' checkpoint, and its rings by layer.
        """
        config = manifest.config(self.folder)
        length = min(sum(extent.count for extent in extents) for extents in manifest.rows.values()) * BLOCK_TOKENS
        stored, rings = length, None
        if manifest.windows:
            checkpoint = self._checkpoints.newest(length)
            if checkpoint is None:
                return 0, 0, None
            stored, rings = checkpoint
            length = min(stored, length)
        fixed = all(tail.weights for tail in manifest.tails.values())
        known = fixed and "tokens" not in self.found.damaged_kinds and length >= config.residual + config.group_size
        return (length, stored, rings) if known else (0, 0, None)

    def _token_copy(self, manifest: Manifest) -> Snapshot:
        assert manifest.token_copy is not None, "a session without a copy of its tokens is not repaired"
        return Snapshot(self.folder / manifest.token_copy, manifest.files[manifest.token_copy], state.token_specs(manifest))
