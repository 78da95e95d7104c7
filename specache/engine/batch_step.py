"""One decode step of all running requests: in one forward pass if possible, else one by one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from specache.engine.decoder import Decoder
from specache.engine.handle import Handle
from specache.engine.runs import Run


class BatchStep:
    """One decode step of every running request.

    Args:
        running: the requests that decode.
        errors_of: a block in which an error ends only this request.
        end: ends a request with an error.
    """

    def __init__(
        self,
        decoder: Decoder,
        running: dict[Handle, Run],
        errors_of: Callable[[Handle], AbstractContextManager[None]],
        end: Callable[[Handle, BaseException], None],
    ) -> None:
        self._decoder, self._running, self._errors_of, self._end = decoder, running, errors_of, end
        self._ready: dict[Handle, list[int]] = {}  # the sequences that each request decodes, by index

    def pre_decode(self) -> None:
        """Choose the first draft tokens of the requests that were just prefilled (Algorithm 2)."""
        if not self._decoder.drafts:
            return
        for handle, run in list(self._running.items()):
            if run.drafts is None and (active := run.active):
                with self._errors_of(handle):
                    logits = self._decoder.pre_decode([run.sequences[i] for i in active], [run.tokens[i] for i in active])
                    run.take_first_drafts(active, logits)

    def decode(self) -> None:
        """Decode one token of every active request (Algorithm 3), after `pre_decode`."""
        self.pre_decode()
        self._ready = {handle: active for handle, run in self._running.items() if (active := run.active)}
        for group in self._groups():
            if len(group) > 1 and self._try_together(group):
                continue
            for handle in group:
                with self._errors_of(handle):
                    self._decode_group([handle])

    def _groups(self) -> list[list[Handle]]:
        """Return the requests by the step's passes: those that can share one, the others alone."""
        together: dict[int, list[Handle]] = {}
        alone: list[list[Handle]] = []
        for handle, active in self._ready.items():
            shared = self._decoder.shared_pass([self._running[handle].sequences[i] for i in active])
            if shared is None:
                alone.append([handle])
            else:
                together.setdefault(shared, []).append(handle)
        return [*together.values(), *alone]

    def _try_together(self, group: list[Handle]) -> bool:
        """Decode requests in one pass. Return False if it failed, which leaves them as before."""
        try:
            self._decode_group(group)
        except Exception:
            return False
        return True

    def _decode_group(self, group: list[Handle]) -> None:
        """Run one pass and hand every request its logits.

        In a group of several, an error while a request handles its logits ends that request. Only
        an error of the pass itself is raised.
        """
        decoder, ready = self._decoder, self._ready
        rows = [(self._running[handle], index) for handle in group for index in ready[handle]]
        drafts = [run.drafts[index] for run, index in rows if run.drafts is not None] if decoder.drafts else None
        step = decoder.step([run.sequences[index] for run, index in rows], [run.tokens[index] for run, index in rows], drafts)
        start, pending = 0, list(group)
        try:
            for handle in group:
                stop = start + len(ready[handle])
                with self._errors_of(handle) if len(group) > 1 else nullcontext():
                    draft_logits = step.draft[start:stop] if decoder.drafts else None
                    self._running[handle].take(ready[handle], step.real[start:stop], draft_logits, decoder.counters)
                start = stop
                pending.remove(handle)
        except BaseException as error:  # Ctrl-C: pending requests lost their logits, and their tokens are stored
            for handle in pending if len(group) > 1 else ():
                self._end(handle, error)
            raise
