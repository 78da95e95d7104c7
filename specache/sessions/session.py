"""`Session`: one sequence's cache whose complete state lies in a folder."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from specache.cache.cache import SpeCache
from specache.cache.sequence import Sequence
from specache.cache.window_checkpoints import Spacing
from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.errors import ConfigError, SessionError, SlowTierError, UsageError
from specache.platform import modes
from specache.sessions import state, store
from specache.sessions.checkpoints import DiskCheckpoints
from specache.sessions.identity import check_identity, identify, needs_probe
from specache.sessions.lock import FolderLock
from specache.sessions.manifest import Identity, Manifest, Rendering
from specache.sessions.manifest_file import TEMPORARY, check_ours, is_saved, read_manifest, refresh_copy
from specache.sessions.model_check import check_rows
from specache.sessions.names import check_free, check_name, is_folder, private_root, root_of
from specache.sessions.saving import blank_manifest, write_state
from specache.sessions.schema import is_data_file
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.disk.system_errors import reason

MOST_SEGMENTS = 8  # files of rows per layer, all of them open with the session; a fork adds one
_LAYOUT = ("bits", "code", "group_size", "residual")


class SessionCache(SpeCache):
    """The cache of a session: one sequence, with its rows in the locked folder."""

    one_sequence = True

    def __init__(self, model: Any, config: SpeCacheConfig, lock: FolderLock, identity: Identity) -> None:
        super().__init__(model, config)
        self._lock = lock
        self.identity = identity

    def begin(self, model: Any) -> None:
        """See `SpeCache.begin`.

        A model that differs from the last one, for example by its adapters, becomes the identity.
        """
        state = self._state
        if state is None or (state.difference(model) or state.difference_of_code(model)) is not None:
            self.remember(model)
            self.identity = replace(identify(model), tokenizer=self.identity.tokenizer)


class Session:
    """An open session, exclusive to this process until it is closed.

    Pass `session.cache` as `past_key_values`, and call `save` to keep the state:

        with specache.Session("report", model, tokenizer=tokenizer) as session:
            specache.generate(model, ids, past_key_values=session.cache)
            session.save()

    A prompt that begins with the stored tokens is prefilled from where it differs. Unsaved state is
    lost on closing.

    Attributes:
        messages: for programs that hold a conversation: its messages as chat templates take them
            ({"role": ..., "content": ...}). They are saved with the state and restored with it.
            Nothing else depends on them.
        rendering: how the program rendered the conversation (date, chat template and variables),
            saved likewise.

    Args:
        name: letters, digits and `._-`. A new session is created, and kept if it is saved.
        model: a transformers model for text generation: the one that the session was made with,
            wrapped or not, with the same active adapters.
        config: settings. Those that the low-bit copy depends on (`code`, `bits`, `group_size`,
            `residual`) must not change; what is left open is taken from the session, and None takes
            all. The 16-bit pairs lie in the session's folder, so omit `slow_tier`.
        tokenizer: if given, the session refuses another one later.
        folder: root of sessions; by default `sessions` in the cache folder (`specache doctor` shows
            it).

    Raises:
        ConfigError: the name is invalid, or a session cannot have these settings.
        SessionError: it is in use, damaged, or belongs to another model; the message says which and
            why.
        SlowTierError: a file of rows is missing or too short, or the folder cannot be written.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        config: SpeCacheConfig | None = None,
        *,
        tokenizer: Any = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.name = check_name(name)
        self._in_default_root = folder is None
        self._root = private_root(root_of(self.name, folder))
        self.folder = self._root / name
        _make_folder(self.folder)
        check_ours(self.folder)
        self._lock = FolderLock(self.folder)
        self._saved: Manifest | None = None
        self._cache: SessionCache | None = None
        try:
            self._saved = self._read_saved()
            self.messages: list[dict[str, str]] = [asdict(one) for one in self._saved.messages] if self._saved else []
            self.rendering: Rendering | None = self._saved.rendering if self._saved else None
            with modes.ours():
                identity = self._checked_identity(model, tokenizer)
                self._cache = SessionCache(model, self._config(config), self._lock, identity)
                self._open()
                if self._saved is not None and needs_probe(self._saved.identity, identity, model):
                    check_rows(self.name, model, self._sequence, self._cache.info.device)
                self._cache.remember(model)
        except BaseException:
            self.close()
            raise

    @property
    def cache(self) -> SpeCache:
        """Return the cache to pass as `past_key_values`; it holds one sequence."""
        if self._cache is None or not self._cache.sequences:
            raise SessionError(f"The session {self.name!r} is closed. Open it again: specache.Session({self.name!r}, model).")
        return self._cache

    @property
    def token_ids(self) -> list[int]:
        """Return the tokens whose keys and values are cached, saved or not."""
        return list(self._sequence.token_ids)

    @property
    def created(self) -> float | None:
        """Return the time of the first save, in seconds since 1970; None if it was never saved."""
        return self._saved.created if self._saved else None

    @property
    def saved_tokens(self) -> int:
        """Return the tokens of the last saved state."""
        return self._saved.tokens if self._saved else 0

    def save(self) -> None:
        """Save the cache's content as the session's state.

        Only new data is written; a crash leaves the last saved state.

        A streamer, a processor or another callback of the call that uses the cache may save too.
        Tokens that have passed every layer are saved.

        Raises:
            SessionError: the state cannot be written. The last state is unchanged, the cache is
                usable, and `save` can be retried.
            SlowTierError: the rows cannot be synced; the same holds.
            UsageError: a call on another thread is using the cache, or a pass of the model is in
                progress (in a hook of a module), or `messages` or `rendering` are invalid. The same
                holds.
        """
        with self.cache.in_use.by("Session.save", from_callbacks=True), modes.ours():
            self._check_in_place()
            self.cache.release_device_batch()
            if any(layer.length != self._sequence.length for layer in self._sequence.layers.values()):
                raise UsageError(
                    "Session.save was called in the middle of a pass of the model. Save between passes, or after the call."
                )
            self._save()

    def _save(self) -> None:
        sequence, tier, blank = self._sequence, self._tier, self._next_manifest()
        if sequence.length == 0:
            sequence.clear()
        for layer in sequence.compressed:
            tier.truncate(layer, sequence.length)  # the tier does not know yet that the sequence was cut
        with suppress(SlowTierError):  # the next save tries again
            tier.merge(MOST_SEGMENTS)
        tier.sync()
        try:
            self._saved = write_state(self.folder, blank, self._saved, sequence, tier, self._checkpoints)
        except OSError as error:
            raise SessionError(
                f"The session {self.name!r} cannot be saved in {self.folder}: {reason(error)} Its last saved state is intact."
            ) from error
        with suppress(OSError):  # the next save tries again
            self._remove_garbage()

    def cut(self, length: int) -> int:
        """Forget the tokens from `length` on and return how many are left.

        Fewer are left if a sliding window, the key scales or length-dependent frequencies cannot go
        back that far. Prefilling the rest gives the state of a fresh prefill. The cut is permanent
        once it is saved.

        Raises:
            SlowTierError: the rows cannot be read; nothing changed.
            UsageError: `length` is negative, or a call is using the cache.
        """
        if length < 0:
            raise UsageError(f"Session.cut takes the number of tokens to keep, at least 0, not {length}.")
        with self.cache.in_use.by("Session.cut"), modes.ours():
            sequence = self._sequence
            if length == 0:
                sequence.clear()
            elif length < sequence.length:
                sequence.truncate(length)
            return sequence.length

    def fork(self, name: str) -> None:
        """Create session `name` from the last saved state.

        Both share the existing files and write new ones.

        Raises:
            ConfigError: the name is invalid.
            SessionError: the name is taken, nothing was saved yet, or the system refuses.
            UsageError: a call is using the cache.
        """
        with self.cache.in_use.by("Session.fork"):
            self._check_in_place()
            if self._in_default_root:
                check_free(root_of(name, None), name)  # there may be two default folders
            self._tier.stop_appending()
            store.fork_folder(self._root, self.name, self._saved, name)

    def close(self) -> None:
        """Free the cache and release the lock, even if freeing fails.

        A never saved session is removed. Safe to call twice.

        Raises:
            UsageError: a call is using the cache; the session stays open.
        """
        if self._cache is None:
            return self._release(None)
        if self._cache.in_use.forked:  # the session belongs to the parent process and stays open there
            cache, self._cache = self._cache, None
            cache.close()
            return self._lock.release()
        with self._cache.in_use.by("Session.close"):
            cache, self._cache = self._cache, None
            self._release(cache)

    def _release(self, cache: SessionCache | None) -> None:
        with self._lock:
            try:
                if cache is not None:
                    cache.free()
            finally:
                if self._saved is None and self._lock.in_place and not is_saved(self.folder):
                    shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UsageError(
            f"A session cannot be copied in memory: session.fork(NAME) makes another one of what {self.name!r} has saved, and "
            "session.cache.fork() an independent cache of what it holds now."
        )

    def __copy__(self) -> NoReturn:
        self.__deepcopy__({})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            f"A session cannot be pickled: save and close it, and open {self.name!r} again where it is wanted "
            f"(specache.Session({self.name!r}, model))."
        )

    # Opening

    def _read_saved(self) -> Manifest | None:
        return read_manifest(self.folder)

    def _checked_identity(self, model: Any, tokenizer: Any) -> Identity:
        mine = identify(model, tokenizer)
        return mine if self._saved is None else check_identity(self.name, self._saved.identity, mine, model)

    def _config(self, requested: SpeCacheConfig | None) -> SpeCacheConfig:
        """Return the requested settings if the stored low-bit copy allows them."""
        stored = None if self._saved is None else self._saved.config(self.folder)
        config = requested or stored or SpeCacheConfig()
        if stored and config.bits == stored.bits:  # what was left open is not asked for
            config = config.completed(stored)
        if config.slow_tier not in (SlowTierKind.AUTO, SlowTierKind.DISK):
            raise ConfigError(
                f"slow_tier={config.slow_tier.value!r} is not for sessions: their 16-bit pairs are on disk. Leave it out."
            )
        config = config.with_changes(slow_tier=SlowTierKind.DISK, slow_dir=str(self.folder))
        if config.policy is Policy.FULL:
            raise ConfigError("policy='full' is not for sessions: it has no rows on disk. Use another policy.")
        holds_copy = self._saved is not None and self._saved.tail is not None
        for name in _LAYOUT if stored and holds_copy else ():
            there, here = getattr(stored, name), getattr(config, name)
            if there != here:
                raise SessionError(
                    f"The session {self.name!r} was made with {name} {there} and is opened with {name} {here}; its low-bit copy "
                    f"cannot be read so. Use {name}={getattr(there, 'value', there)!r}, or another session."
                )
        return config

    def _open(self) -> None:
        """Give the cache its sequence with the saved state."""
        manifest, cache = self._saved, self._cache
        assert cache is not None
        expected = {i: (d.kv_heads, d.head_dim, d.window) for i, d in enumerate(cache.resources.dimensions.layers)}
        sequence = cache.new_sequence()
        cache.sequences = [sequence]
        sequence.tier.close()
        if manifest is None or manifest.tail is None:
            sequence.tier = DiskTier(self.folder, temporary=False)
        else:
            state.check_shapes(manifest, expected, cache.info.dtype)
            tail = state.open_tail(self.folder, manifest)
            sequence.tier = state.open_tier(self.folder, manifest, tail)
            state.restore(sequence, cache.info.device, self.folder, manifest, tail)
        spacing = Spacing.of([window for window in cache.info.windows if window is not None] or [1])
        self._checkpoints = DiskCheckpoints(spacing, self.folder, manifest)
        sequence.checkpoints = self._checkpoints
        self._check_sizes()
        refresh_copy(self.folder)
        try:
            self._remove_garbage()
        except OSError as error:
            raise SessionError(f"The session's folder {self.folder} cannot be written: {reason(error)}") from error

    def _check_sizes(self) -> None:
        """Check the sizes of files that were not read yet, so that missing ones are noticed now."""
        for name, file in self._checkpoints.files.items():
            path = self.folder / name
            try:
                size = path.lstat().st_size
            except OSError as error:
                raise SessionError(f"{path} cannot be read: {reason(error)}") from error
            if size != file.bytes:
                raise SessionError(f"{path} has {size:,} bytes, but {file.bytes:,} were written. {state.DAMAGED}")

    # Saving

    def _check_in_place(self) -> None:
        """Check that nothing is written into a folder that another process may have."""
        if not self._lock.in_place:
            raise SessionError(
                f"The folder of the session {self.name!r}, {self.folder}, was moved, replaced or removed while it was open. "
                "Nothing was written. Put it back and try again; or close the session and open what is there now."
            )

    def _next_manifest(self) -> Manifest:
        """Return the next manifest without the state.

        Raises:
            UsageError: `messages` or `rendering` could not be read again.
        """
        assert self._cache is not None
        return blank_manifest(self._cache.identity, self._cache.config, self.created, self.messages, self.rendering)

    def _remove_garbage(self) -> None:
        """Remove old and unfinished files that neither the saved state nor the cache needs.

        Raises:
            OSError: a file cannot be removed.
        """
        needed = {*self._tier.file_names(), *(one.file for one in self._checkpoints.kept)}
        if self._saved is not None:
            needed |= {*self._saved.files, *self._saved.row_files()}
        for path in self.folder.iterdir():
            if path.name not in needed and (path.name == TEMPORARY or is_data_file(path.name)):
                path.unlink(missing_ok=True)

    @property
    def _sequence(self) -> Sequence:
        return self.cache.sequences[0]

    @property
    def _tier(self) -> DiskTier:
        tier = self._sequence.tier
        assert isinstance(tier, DiskTier)
        return tier


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SessionError(f"The session's folder {folder} cannot be made: {reason(error)}") from error
    if not is_folder(folder):
        raise SessionError(f"{folder} is no folder of its own (a link, perhaps). Remove it, or choose another name.")
