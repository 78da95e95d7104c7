"""Marks of a model's tensors, and which tensors differ from their marks.

A tensor is unchanged if the object, its storage address, its version and a sample are equal. If it
moved, was written to, or is another object, its complete content decides. Objects are held weakly,
so that a reused address is not mistaken for the old one.
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
_digests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> ((place, sample), digest of its content)


@dataclass(frozen=True)
class TensorMark:
    """The recorded state of a tensor.

    Attributes:
        holder: weak reference to the object that has the elements; None for a file.
        place: storage address and version (None if it has none), or what identifies a file.
        kind: shape, dtype and device.
        sample: sample of the content.
        digest: digest of the complete content; for a file, of the sample.
        by_run: as in `Weight`.
    """

    holder: _Holder | None
    place: tuple[Any, ...]
    kind: tuple[Any, ...]
    sample: bytes
    digest: bytes
    by_run: bool


@dataclass(frozen=True)
class _Current:
    """The current state of a tensor.

    `sample` and `digest` are as in a mark; `digest()` reads all elements.
    """

    held: Any
    place: tuple[Any, ...]
    kind: tuple[Any, ...]
    sample: Callable[[], bytes]
    digest: Callable[[], bytes]
    by_run: bool

    def is_at(self, mark: TensorMark) -> bool:
        """Return True for the object of a mark at the same place, without a counted write."""
        same = mark.holder is None if self.held is None else mark.holder is not None and mark.holder() is self.held
        return same and self.place == mark.place

    def is_as(self, mark: TensorMark) -> bool:
        """Return True if this has the content of a mark."""
        if self.kind != mark.kind or self.sample() != mark.sample:
            return False
        return self.is_at(mark) or self.digest() == mark.digest

    def mark(self) -> TensorMark:
        return TensorMark(_weak(self.held), self.place, self.kind, self.sample(), self.digest(), self.by_run)


def remember(found: Sequence[Layer], model: Any) -> dict[str, TensorMark]:
    """Return marks of all tensors of a model."""
    return {name: seen.mark() for name, seen in _current(found, model, {})}


def remember_after_run(found: Sequence[Layer], model: Any, before: dict[str, TensorMark]) -> dict[str, TensorMark]:
    """Return the marks from before a run, updated for tensors that a run itself may change.

    A tensor that was changed from outside while the model ran (a streamer that merges an adapter)
    keeps its old mark. It then differs, so that the stored cache is not continued with it.
    """
    marks = {name: mark for name, mark in before.items() if not mark.by_run}
    for name, seen in _current(found, model, before):
        mark = before.get(name)
        if mark is None or seen.is_as(mark):
            marks[name] = mark if mark is not None and seen.is_at(mark) else seen.mark()
        elif mark.by_run and seen.by_run:
            marks[name] = seen.mark()
    return marks


def difference_of_tensors(before: dict[str, TensorMark], found: Sequence[Layer], model: Any) -> str | None:
    """Return a description of the first tensor that differs from its mark, or None."""
    now = dict(_current(found, model, before))
    if before.keys() != now.keys():
        name = next(name for name in {**before, **now} if name not in before or name not in now)
        return f"its tensor {name} {'is gone' if name in before else 'is new'}"
    for name, seen in now.items():
        mark = before[name]
        if seen.kind != mark.kind:
            return f"its tensor {name} was {_kind_text(mark.kind)} and is {_kind_text(seen.kind)}"
        if not seen.is_as(mark):
            return f"its tensor {name} has other values"
    return None


def _current(found: Sequence[Layer], model: Any, before: dict[str, TensorMark]) -> Iterator[tuple[str, _Current]]:
    everything = list(weights(found, model))
    samples = _samples(everything)
    for weight in everything:
        content, mark = weight.content, before.get(weight.name)
        if isinstance(content, Tensor):
            yield weight.name, _current_tensor(content, samples.get(id(content), b""), weight.by_run)
        elif isinstance(content, FileTensor):
            yield weight.name, _current_file(content, mark)
        else:
            yield weight.name, _current_packed(content, mark)


def _samples(everything: Sequence[Weight]) -> dict[int, bytes]:
    """Sample every tensor that has elements, once, and return the samples by id."""
    tensors: dict[int, tuple[Tensor, bool]] = {}
    for weight in everything:
        if isinstance(weight.content, Tensor) and not weight.content.is_meta:
            tensors[id(weight.content)] = (weight.content, weight.table)
    found = spread([tensor for tensor, _ in tensors.values()], [table for _, table in tensors.values()])
    return dict(zip(tensors, found, strict=True))


def _current_tensor(tensor: Tensor, sample: bytes, by_run: bool) -> _Current:
    version = None if tensor.is_inference() else tensor._version
    place = (0 if tensor.is_meta else tensor.data_ptr(), version)
    kind = (tuple(tensor.shape), tensor.dtype, tensor.device)

    def digest() -> bytes:
        if tensor.is_meta:
            return b""
        known = _digests.get(tensor)
        # the sample is part of the key: a write through `tensor.data` counts no version
        if known is None or known[0] != (place, sample):
            known = _digests[tensor] = ((place, sample), content_digest(tensor))
        return known[1]

    return _Current(tensor, place, kind, lambda: sample, digest, by_run)


def _current_file(file: FileTensor, before: TensorMark | None) -> _Current:
    """Return the state of a file, which is read only if it changed."""
    place = (*file.stamp(), file.start)
    known = before is not None and before.place == place

    def sample() -> bytes:
        return before.sample if known and before is not None else file_runs(file)

    return _Current(None, place, (file.shape, file.dtype, "disk"), sample, sample, by_run=False)


def _current_packed(packed: PackedTensors, before: TensorMark | None) -> _Current:
    """Return the state of a packed object, which is unpacked only if it is another object."""
    known = before is not None and before.holder is not None and before.holder() is packed.packed

    def digest() -> bytes:
        if known and before is not None:
            return before.digest
        return b"".join(content_digest(tensor) for tensor in packed.tensors())

    return _Current(packed.packed, (), ("packed",), lambda: b"", digest, by_run=True)


def _weak(held: Any) -> _Holder | None:
    if held is None:
        return None
    return TensorWeakRef(held) if isinstance(held, Tensor) else weakref.ref(held)


def _kind_text(kind: tuple[Any, ...]) -> str:
    if len(kind) < 3:
        return "packed"
    shape, dtype, device = kind
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"
