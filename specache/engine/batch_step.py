"""One decode step of all running requests: in one forward pass if possible, else one by one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from specache.engine.decoder import Decoder
from specache.engine.handle import Handle
from specache.engine.runs import Run

Running = dict[Handle, Run]
ErrorsOf = Callable[[Handle], AbstractContextManager[None]]  # an error in the block ends only this request


def pre_decode(decoder: Decoder, running: Running, errors_of: ErrorsOf) -> None:
    """Choose the first draft tokens of the requests that were just prefilled (Algorithm 2)."""
    if not decoder.drafts:
        return
    for handle, run in list(running.items()):
        if run.drafts is None and (active := run.active):
            with errors_of(handle):
                logits = decoder.pre_decode([run.sequences[i] for i in active], [run.tokens[i] for i in active])
                run.take_first_drafts(active, logits)


def decode(decoder: Decoder, running: Running, errors_of: ErrorsOf, end: Callable[[Handle, BaseException], None]) -> None:
    """Decode one token of every active request (Algorithm 3).

    Args:
        end: ends a request with an error.
    """
    ready = {handle: active for handle, run in running.items() if (active := run.active)}
    for group in _groups(decoder, running, ready):
        if len(group) > 1 and _try_decode_together(decoder, group, running, ready, errors_of, end):
            continue
        for handle in group:
            with errors_of(handle):
                _decode_group(decoder, [handle], running, ready, errors_of, end)


def _groups(decoder: Decoder, running: Running, ready: dict[Handle, list[int]]) -> list[list[Handle]]:
    """Return the requests by the passes of the step: those that can share one, the others alone."""
    together: dict[int, list[Handle]] = {}
    alone: list[list[Handle]] = []
    for handle, active in ready.items():
        shared = decoder.shared_pass([running[handle].sequences[i] for i in active])
        if shared is None:
            alone.append([handle])
        else:
            together.setdefault(shared, []).append(handle)
    return [*together.values(), *alone]


def _try_decode_together(
    decoder: Decoder,
    group: list[Handle],
    running: Running,
    ready: dict[Handle, list[int]],
    errors_of: ErrorsOf,
    end: Callable[[Handle, BaseException], None],
) -> bool:
    """Decode requests in one pass. Return False if it failed, which leaves them as they were."""
    try:
        _decode_group(decoder, group, running, ready, errors_of, end)
    except Exception:
        return False
    return True


def _decode_group(
    decoder: Decoder,
    group: list[Handle],
    running: Running,
    ready: dict[Handle, list[int]],
    errors_of: ErrorsOf,
    end: Callable[[Handle, BaseException], None],
) -> None:
    """Run one pass and hand every request its logits.

    In a group of several, an error while a request handles its logits ends that request. Only an
    error of the pass itself is raised.
    """
    rows = [(running[handle], index) for handle in group for index in ready[handle]]
    drafts = [run.drafts[index] for run, index in rows if run.drafts is not None] if decoder.drafts else None
    step = decoder.step([run.sequences[index] for run, index in rows], [run.tokens[index] for run, index in rows], drafts)
    start, pending = 0, list(group)
    try:
        for handle in group:
            stop = start + len(ready[handle])
            with errors_of(handle) if len(group) > 1 else nullcontext():
                draft_logits = step.draft[start:stop] if decoder.drafts else None
                running[handle].take(ready[handle], step.real[start:stop], draft_logits, decoder.counters)
            start = stop
            pending.remove(handle)
    except BaseException as error:  # Ctrl-C: pending requests lost their logits, and their tokens are stored
        for handle in pending if len(group) > 1 else ():
            end(handle, error)
        raise
