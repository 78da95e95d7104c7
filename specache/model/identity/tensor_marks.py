"""What is remembered of a model's tensors, and which of them are others now.

A tensor is the same where the object, its storage address, its version and a sample are. Where it moved, was written to, or is
another object, all of its content decides. An object is held weakly, so that an address that is used again is not taken for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from specache.model.identity.offloaded_weights import FileTensor
from specache.model.identity.samples import content_digest, file_runs, spread
from specache.model.identity.tensors import Layer, PackedTensors, Weight, weights

_Holder = Callable[[], Any]  # a weak reference
_digests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> (its place and sample, digest of its content)


@dataclass(frozen=True)
class TensorMark:
    """A tensor as it was.

    Attributes:
        holder: weak reference to the object that has the elements; `None` for a file.
        place: storage address and version (`None`: it counts none), or what identifies a file.
        kind: shape, dtype and device.
        sample: of the content.
        digest: of all of the content; of a file, of the sample.
        by_run: as of `Weight`.
    """

    holder: _Holder | None
    place: tuple[Any, ...]
    kind: tuple[Any, ...]
    sample: bytes
    digest: bytes
    by_run: bool


@dataclass(frozen=True)
class _Seen:
    """A tensor as it is now. `sample` and `digest` as of a mark; `digest()` reads everything."""

    held: Any
    place: tuple[Any, ...]
    kind: tuple[Any, ...]
    sample: Callable[[], bytes]
    digest: Callable[[], bytes]
    by_run: bool

    def is_at(self, mark: TensorMark) -> bool:
        """Whether this is the object of a mark, where it was, and not written to since as far as PyTorch counts."""
        same = mark.holder is None if self.held is None else mark.holder is not None and mark.holder() is self.held
        return same and self.place == mark.place

    def is_as(self, mark: TensorMark) -> bool:
        """Whether this has the content of a mark."""
        if self.kind != mark.kind or self.sample() != mark.sample:
            return False
        return self.is_at(mark) or self.digest() == mark.digest

    def mark(self) -> TensorMark:
        return TensorMark(_weak(self.held), self.place, self.kind, self.sample(), self.digest(), self.by_run)


def remember(found: Sequence[Layer], model: Any) -> dict[str, TensorMark]:
    """Return marks of all tensors of a model."""
    return {name: seen.mark() for name, seen in _look(found, model, {})}


def remember_after_run(found: Sequence[Layer], model: Any, before: dict[str, TensorMark]) -> dict[str, TensorMark]:
    """Return the marks of before a run, of what a run itself may change those of now.

    A tensor whose values somebody changed while the model ran (a streamer that merges an adapter) keeps the mark of before: it is
    another one than at the beginning, so that what is stored is not continued with it.
    """
    marks = {name: mark for name, mark in before.items() if not mark.by_run}
    for name, seen in _look(found, model, before):
        mark = before.get(name)
        if mark is None or seen.is_as(mark):
            marks[name] = mark if mark is not None and seen.is_at(mark) else seen.mark()
        elif mark.by_run and seen.by_run:
            marks[name] = seen.mark()
    return marks


def difference_of_tensors(before: dict[str, TensorMark], found: Sequence[Layer], model: Any) -> str | None:
    """Say which tensor is another one than it was, or None."""
    now = dict(_look(found, model, before))
    if before.keys() != now.keys():
        name = next(name for name in {**before, **now} if name not in before or name not in now)
        return f"its tensor {name} {'is gone' if name in before else 'is new'}"
    for name, seen in now.items():
        mark = before[name]
        if seen.kind != mark.kind:
            return f"its tensor {name} was {_said(mark.kind)} and is {_said(seen.kind)}"
        if not seen.is_as(mark):
            return f"its tensor {name} has other values"
    return None


def _look(found: Sequence[Layer], model: Any, before: dict[str, TensorMark]) -> Iterator[tuple[str, _Seen]]:
    everything = list(weights(found, model))
    samples = _samples(everything)
    for weight in everything:
        content, mark = weight.content, before.get(weight.name)
        if isinstance(content, Tensor):
            yield weight.name, _see_tensor(content, samples.get(id(content), b""), weight.by_run)
        elif isinstance(content, FileTensor):
            yield weight.name, _see_file(content, mark)
        else:
            yield weight.name, _see_packed(content, mark)


def _samples(everything: Sequence[Weight]) -> dict[int, bytes]:
    """Sample every tensor that has elements, once -> sample by id."""
    tensors: dict[int, tuple[Tensor, bool]] = {}
    for weight in everything:
        if isinstance(weight.content, Tensor) and not weight.content.is_meta:
            tensors[id(weight.content)] = (weight.content, weight.table)
    found = spread([tensor for tensor, _ in tensors.values()], [table for _, table in tensors.values()])
    return dict(zip(tensors, found, strict=True))


def _see_tensor(tensor: Tensor, sample: bytes, by_run: bool) -> _Seen:
    version = None if tensor.is_inference() else tensor._version
    place = (0 if tensor.is_meta else tensor.data_ptr(), version)
    kind = (tuple(tensor.shape), tensor.dtype, tensor.device)

    def digest() -> bytes:
        if tensor.is_meta:
            return b""
        known = _digests.get(tensor)
        if known is None or known[0] != (place, sample):  # the sample: a write through `tensor.data` counts no version
            known = _digests[tensor] = ((place, sample), content_digest(tensor))
        return known[1]

    return _Seen(tensor, place, kind, lambda: sample, digest, by_run)


def _see_file(file: FileTensor, before: TensorMark | None) -> _Seen:
    """A file that is as it was is not read again."""
    place = (*file.stamp(), file.start)
    known = before is not None and before.place == place

    def sample() -> bytes:
        return before.sample if known and before is not None else file_runs(file)

    return _Seen(None, place, (file.shape, file.dtype, "disk"), sample, sample, by_run=False)


def _see_packed(packed: PackedTensors, before: TensorMark | None) -> _Seen:
    """An object that is the same is not taken apart again."""
    known = before is not None and before.holder is not None and before.holder() is packed.packed

    def digest() -> bytes:
        if known and before is not None:
            return before.digest
        return b"".join(content_digest(tensor) for tensor in packed.tensors())

    return _Seen(packed.packed, (), ("packed",), lambda: b"", digest, by_run=True)


def _weak(held: Any) -> _Holder | None:
    if held is None:
        return None
    return TensorWeakRef(held) if isinstance(held, Tensor) else weakref.ref(held)


def _said(kind: tuple[Any, ...]) -> str:
    if len(kind) < 3:
        return "packed"
    shape, dtype, device = kind
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"
