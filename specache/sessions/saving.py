"""Write a sequence's state into a session's folder: only new data, then the manifest.

The state is committed when the manifest is replaced.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from specache.cache.sequence import Sequence as CachedSequence
from specache.config import PAGE_TOKENS, SpeCacheConfig
from specache.errors import SessionError, UsageError
from specache.sessions import state
from specache.sessions.checkpoints import DiskCheckpoints
from specache.sessions.files import StoredFile
from specache.sessions.manifest import Identity, Manifest, Message, PageSpan, Rendering, settings_of
from specache.sessions.manifest_file import check_readable, read_manifest, refusal_reason, write_manifest
from specache.sessions.snapshot import TensorSpec, write_snapshot
from specache.tiers.disk.disk_tier import DiskTier

LONGEST_CHAIN = 32  # files of pages before they are merged into one


def blank_manifest(
    identity: Identity,
    config: SpeCacheConfig,
    created: float | None,
    messages: Sequence[Mapping[str, str]],
    rendering: Rendering | None,
) -> Manifest:
    """Return a manifest saved now, without the state.

    Args:
        created: time of the first save; None means now.

    Raises:
        UsageError: the program's `messages` or `rendering` could not be read again.
    """
    now = time.time()
    try:
        stored_messages = tuple(Message(one["role"], one["content"]) for one in messages)
        blank = Manifest(
            identity, settings_of(config), now if created is None else created, now, messages=stored_messages, rendering=rendering
        )
        check_readable(blank)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"session.messages or session.rendering cannot be saved: {refusal_reason(error)}. A message is {{'role': text, "
            "'content': text}, and a rendering a specache.sessions.manifest.Rendering with a date in ISO 8601 and variables that "
            "JSON has. Nothing was saved; change them and save again."
        ) from None
    return blank


def write_state(
    folder: Path, blank: Manifest, before: Manifest | None, sequence: CachedSequence, tier: DiskTier, checkpoints: DiskCheckpoints
) -> Manifest:
    """Save the state of `sequence`, whose rows are synced already, and return the new manifest.

    Args:
        blank: the manifest without the state.
        before: the current manifest of the folder.

    Raises:
        OSError: the state cannot be written; the folder still has `before`.
    """
    new: dict[str, StoredFile] = {}
    try:
        pages = _write_pages(folder, before, sequence, new)
        tail = copy = None
        if sequence.layers:
            tensors = state.tail_tensors(sequence, tier)
            tail = _write(folder, "tail", tensors, new)
            copy = _write(folder, "tokens", state.token_part(tensors), new)
        known = {**(before.files if before else {}), **checkpoints.files, **new}
        used = {*(span.file for span in pages), *(one.file for one in checkpoints.kept), *filter(None, [tail, copy])}
        manifest = replace(
            blank,
            tokens=sequence.length,
            finish_reason=sequence.finish_reason,
            prompt_tokens=sequence.prompt_tokens,
            pending_token=sequence.pending_token,
            decode_steps=sequence.decode_steps,
            compiled_steps=sequence.compiled_steps,
            ring_tokens=state.ring_tokens(sequence),
            layers=state.shapes(sequence),
            rows=tier.extents(),
            tails=state.tail_shapes(sequence),
            pages=pages,
            tail=tail,
            token_copy=copy,
            checkpoints=tuple(checkpoints.kept),
            files={name: known[name] for name in sorted(used)},
        )
        write_manifest(folder, manifest)
    except OSError:
        with suppress(SessionError):
            if read_manifest(folder) == before:  # the new manifest was not put in place
                for name in new:
                    (folder / name).unlink(missing_ok=True)
        raise
    for layer in sequence.compressed.values():
        layer.table.mark()
    return manifest


def _write_pages(
    folder: Path, before: Manifest | None, sequence: CachedSequence, new: dict[str, StoredFile]
) -> tuple[PageSpan, ...]:
    """Write the pages that were not saved yet, or all if there are too many files; return all
    spans.
    """
    tables = [layer.table for layer in sequence.compressed.values()]
    if not tables:
        return ()
    spans = _first_pages(before.pages if before else (), min(table.unchanged for table in tables) // PAGE_TOKENS)
    if len(spans) >= LONGEST_CHAIN:
        spans = []
    start, stop = sum(span.count for span in spans), tables[0].length // PAGE_TOKENS
    if stop > start:
        name = _write(folder, "pages", state.page_tensors(sequence, start, stop), new)
        spans.append(PageSpan(name, stop - start, stop - start))
    return tuple(spans)


def _first_pages(spans: tuple[PageSpan, ...], pages: int) -> list[PageSpan]:
    """Return the spans of the first `pages` pages."""
    kept: list[PageSpan] = []
    for span in spans:
        if pages > 0:
            kept.append(replace(span, count=min(span.count, pages)))
            pages -= span.count
    return kept


def _write(folder: Path, kind: str, tensors: Mapping[str, TensorSpec], new: dict[str, StoredFile]) -> str:
    name = f"{kind}-{secrets.token_hex(8)}.safetensors"
    new[name] = write_snapshot(folder / name, tensors)
    return name
