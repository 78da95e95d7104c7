"""The resources of a disk tier: its share of files, of a scratch folder and of a reader."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from specache.errors import SlowTierError
from specache.platform import forks
from specache.tiers.disk import aligned_io, readers
from specache.tiers.disk.extents import BlockTable, Extent
from specache.tiers.disk.probe import ReaderReport, report_for
from specache.tiers.disk.readers import Reader
from specache.tiers.disk.row_file import RowFile, new_segment
from specache.tiers.disk.row_layout import RowLayout
from specache.tiers.disk.scratch import ScratchFolder
from specache.tiers.disk.system_errors import reason


class TierFiles:
    """A tier's files, created and opened on demand.

    Args:
        folder: the user's or a session's folder.
        temporary: files are created in a scratch folder inside it, and removed with the last tier
            that needs them.
    """

    def __init__(self, folder: Path, temporary: bool) -> None:
        self.folder = folder
        self.temporary = temporary
        self.lock = forks.reentrant_lock()
        self._process = os.getpid()
        self._files: list[RowFile] = []
        self._own: dict[int, RowFile] = {}  # files that the tier appends to, by layer
        self._segment: str | None = None
        self._unsynced: set[RowFile] = set()
        self._scratch: ScratchFolder | None = None
        self._report: ReaderReport | None = None
        self._reader: Reader | None = None
        self._step_reads: tuple[int, Any] | None = None  # process, and its reads

    def reader(self) -> Reader:
        """Return the folder's reader, leased until `give_back`.

        Raises:
            SlowTierError: the folder cannot be used.
        """
        with self.lock:
            if self._reader is None:
                try:
                    self._report = self._report or report_for(self.folder)
                    self._reader = self._report.lease()
                except OSError as error:
                    raise SlowTierError(f"The slow tier's folder {self.folder} cannot be used: {reason(error)}") from error
            return self._reader

    def step_reads(self) -> Any | None:
        """Return the C++ reads of the tier's decode steps (`native_reads.StepReads`).

        `None` where the reader is no ring. A forked process has its own.

        Raises:
            SlowTierError: the folder cannot be used.
        """
        with self.lock:
            if self._step_reads is None or self._step_reads[0] != os.getpid():
                native = self.reader().native
                self._step_reads = os.getpid(), None if native is None else native.new_reads()
            return self._step_reads[1]

    def own_file(self, layer: int, layout: RowLayout) -> RowFile:
        """Return the file that the tier appends a layer to, created on first use."""
        with self.lock:
            if layer not in self._own:
                self._segment = self._segment or new_segment()
                self._own[layer] = self._new_file(self._segment, layer, layout)
                self._files.append(self._own[layer])
            self._unsynced.add(self._own[layer])
            return self._own[layer]

    def table(self, layer: int, layout: RowLayout, extents: Sequence[Extent]) -> BlockTable:
        """Return a saved table over newly opened files.

        Raises:
            SlowTierError: a file is missing or too short.
        """
        files: dict[str, RowFile] = {}
        table = BlockTable()
        for extent in extents:
            if extent.segment not in files:
                file = RowFile(self.folder, extent.segment, layer, layout, direct=self.reader().direct, create=False)
                files[extent.segment] = file
                self._files.append(file)
            file = files[extent.segment]
            file.check_size(extent.first_block + extent.count)
            table = table.appended(file, extent.first_block, extent.count)
        return table

    def adopt(self, layer: int, table: BlockTable) -> None:
        """Continue appending to the file of a saved table's last blocks, unless it is shared.

        Data behind the table's blocks belongs to no saved state, and is overwritten.
        """
        last = table.runs[-1].file if table.runs else None
        if last is not None and not last.is_shared:
            last.blocks = max(run.first + run.blocks for run in table.runs if run.file is last)
            self._own[layer] = last

    def stop_appending(self) -> None:
        """Write to new files from now on: the existing files were hard-linked."""
        with self.lock:
            self._stop_appending()

    def names(self) -> set[str]:
        """Return the names of all open files."""
        with self.lock:
            return {file.path.name for file in self._files}

    def release_all_but(self, used: set[RowFile]) -> None:
        """Release the files that hold no rows of the tier any more."""
        with self.lock:
            used = used | set(self._own.values())
            unused = [file for file in self._files if file not in used]
            self._files = [file for file in self._files if file in used]
            self._unsynced.intersection_update(used)
        for file in unused:
            file.release()

    def share_with(self, other: TierFiles) -> None:
        """Share the existing files with another tier. Both append to new ones from now on."""
        with self.lock:
            self._stop_appending()
            other._report = self._report
            for file in self._files:
                file.acquire()
                other._files.append(file)

    def sync(self) -> None:
        """Return when everything written so far survives a power failure.

        Raises:
            SlowTierError: the system could not confirm it.
        """
        try:
            while self._unsynced:
                file = next(iter(self._unsynced))
                os.fdatasync(file.fd)
                self._unsynced.discard(file)
            aligned_io.sync_folder(self.folder)
        except OSError as error:
            raise SlowTierError(f"The rows in {self.folder} cannot be made safe: {reason(error)}") from error

    def give_back(self, wait: bool = False) -> None:
        """Release everything. The tier may be reused.

        A temporary tier's files are removed if no other tier needs them. A forked process has
        copies of its parent's files and leaves them alone: a thread that does not exist there may
        hold a lock.
        """
        if self._process != os.getpid():
            return
        with self.lock:
            self._stop_appending()
            self._unsynced.clear()
            files, self._files = self._files, []
            scratch, self._scratch = self._scratch, None
            reader, self._reader = self._reader, None
            self._step_reads = None
        with ExitStack() as stack:  # release all of them, even if interrupted in between
            if reader is not None:
                stack.callback(readers.release, reader, wait)
            if scratch is not None:
                stack.callback(scratch.release)
            for file in files:
                stack.callback(file.release)

    def _stop_appending(self) -> None:
        self._own.clear()
        self._segment = None

    def _new_file(self, segment: str, layer: int, layout: RowLayout) -> RowFile:
        direct = self.reader().direct
        if not self.temporary:
            return RowFile(self.folder, segment, layer, layout, direct=direct, create=True)
        if self._scratch is None:
            self._scratch = ScratchFolder(self.folder)
        return RowFile(self._scratch.path, segment, layer, layout, direct=direct, create=True, scratch=self._scratch)
