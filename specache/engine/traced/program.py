"""One decoder layer as a program: what comes before its attention, and what comes after.

A program is of one shape of input. It is checked on the input that it was recorded with: where its
results differ from the layer's own by more than rounding, there is no program.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from specache.engine.traced.call_shape import STATE, CallShape, Spec, spec_of
from specache.engine.traced.layer_operations import Operand, Operation, Unrecordable, numbers_of
from specache.engine.traced.recorder import Recorder
from specache.kernels.types import AttentionParams
from specache.linear import native_products
from specache.platform import extension
from specache.platform.step_threads import step_threads

ALIGNMENT = 64
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}  # of the largest result

Made = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides
Attend = Callable[[int, Tensor, Tensor, Tensor, AttentionParams], Tensor]


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> Tensor:
        """Return at least `size` bytes, which the thread's next program overwrites."""
        if self.memory.numel() < size:
            self.memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
        return self.memory


_scratch = _Scratch()


class Program:
    """Runs one layer for inputs of one shape. It is recorded when it is made.

    Args:
        like: the program of another layer with the same code and settings, which is used for this
            layer's weights instead of recording it once more. That takes less than half the time.

    Raises:
        Unrecordable: the layer does what a program cannot, or the program's results differ from its
            own.
    """

    _results: list[_Result]
    _middle: int  # operations before the attention
    _made: list[Made]  # the buffers of results
    _attention_base: int
    _scratch_bytes: int
    _program: Any

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], like: Program | None = None) -> None:
        self.call, tensors = CallShape.of(args, kwargs)
        weights = {each.untyped_storage().data_ptr(): each for each in _weights(layer)}
        storages = [each.untyped_storage().data_ptr() for each in tensors]
        if len({*storages, *weights}) < len(storages) + len(weights):
            raise Unrecordable("arguments that share memory")
        self._weights = list(weights)
        self._layout = [(self._weights.index(each.untyped_storage().data_ptr()), spec_of(each)) for each in _weights(layer)]
        recorder = Recorder([*tensors, *weights.values()])
        attention = RecordedAttention(recorder)
        state = {**kwargs, STATE: attention}
        if like is None:
            with recorder, native_products.as_operators():
                result = type(layer).forward(layer, *args, **state)
        else:
            result = type(layer).forward(layer, *args, **state)
        if recorder.reason is not None or attention.index is None:
            raise Unrecordable(recorder.reason or "it does not attend")
        self._index, self._params = attention.index, attention.params
        self._tuple = isinstance(result, tuple)
        out = result[0] if isinstance(result, tuple) else result
        if isinstance(result, tuple) and any(each is not None for each in result[1:]):
            raise Unrecordable("several results")
        self._rest = (None,) * (len(result) - 1) if isinstance(result, tuple) else ()
        self._attended = spec_of(attention.out)
        if like is None:
            self._results = [_Result(recorder.place(each)) for each in (*attention.given, out)]
            self._middle = attention.operations
            self._lay_out(recorder, len(tensors), attention.buffer)
        else:
            self._take_from(like)
        self._check(args, kwargs, attention, out)

    def run(self, addresses: list[int], attend: Attend) -> Any:
        """Return the layer's result.

        Args:
            addresses: of the call's tensors, from `CallShape.addresses`.
        """
        made = [torch.empty_strided(shape, strides, dtype=dtype, device="cpu") for shape, strides, dtype in self._made]
        scratch = _scratch.of(self._scratch_bytes)
        bases = [scratch.data_ptr(), *addresses, *(each.data_ptr() for each in made), 0, *self._weights]
        threads = step_threads()
        self._program.run(threads, 0, self._middle, bases)
        query, keys, values, result = (each.of(made) for each in self._results)
        out = attend(self._index, query, keys, values, self._params)
        if spec_of(out) != self._attended:
            out = out.to(self._attended[3]).contiguous()
        bases[self._attention_base] = out.data_ptr()
        self._program.run(threads, self._middle, len(self._program), bases)
        return self.returned(result)

    def returned(self, result: Tensor) -> Any:
        """Return a result as the layer does."""
        return (result, *self._rest) if self._tuple else result

    @property
    def places(self) -> set[int]:
        """Where the memory of the weights begins that it reads."""
        return {*self._weights}

    @property
    def kv_shape(self) -> tuple[int, int]:
        """KV heads and head dimension."""
        _, heads, _, dim = self._results[1].view[0]
        return heads, dim

    @property
    def query_dtype(self) -> torch.dtype:
        return self._results[0].dtype

    @property
    def result_spec(self) -> Spec | None:
        """How the result lies in its buffer, `None` if it is not alone there."""
        *given, result = self._results
        alone = result.whole and result.view[2] == 0 and all(each.made != result.made for each in given)
        return (result.view[0], result.view[1], 0, result.dtype) if alone else None

    def add_to(self, chain: Any) -> None:
        """Add this layer to a native chain.

        Raises:
            Unrecordable: its attention cannot be called from there.
        """
        query, keys, values, result = self._results
        (batch, query_heads, n, dim), (_, heads, *_) = query.view[0], keys.view[0]
        wanted = (batch, n, query_heads, dim)
        strides = n * query_heads * dim, query_heads * dim, dim, 1
        plain = self._attended == (wanted, strides, 0, query.dtype) and keys.view[0] == values.view[0] == (batch, heads, n, dim)
        if (
            not plain
            or not query.dtype is keys.dtype is values.dtype
            or any(each.view[1][3] != 1 for each in (query, keys, values))
        ):
            raise Unrecordable("attention of another form")
        sinks = self._params.sinks
        if sinks is not None and not sinks.is_contiguous():
            raise Unrecordable("sinks that are not contiguous")
        chain.add(
            self._program,
            self._middle,
            self._scratch_bytes,
            [math.prod(shape) * dtype.itemsize for shape, _, dtype in self._made],
            result.made,
            [(each.made, each.view[2] * each.dtype.itemsize, each.view[1]) for each in (query, keys, values)],
            math.prod(wanted) * query.dtype.itemsize,
            self._weights,
            (
                *(extension.DTYPES[query.dtype], extension.DTYPES[keys.dtype], query_heads // heads, n),
                *(self._params.scaling, self._params.softcap or 0.0),
                *((0, 0) if sinks is None else (sinks.data_ptr(), extension.DTYPES[sinks.dtype])),
            ),
        )

    def _take_from(self, other: Program) -> None:
        """Run another layer's operations."""
        mine, others = ((each.call, each._layout, each._attended, each._tuple, each._rest) for each in (self, other))
        if mine != others:
            raise Unrecordable("a layer of another structure")
        self._results, self._middle, self._made = other._results, other._middle, other._made
        self._attention_base, self._scratch_bytes, self._program = other._attention_base, other._scratch_bytes, other._program

    def _lay_out(self, recorder: Recorder, inputs: int, attention: int) -> None:
        """Give every buffer its place among the bases of a run.

        They are: the scratch memory, the inputs, the results (one buffer may be that of several of
        them), the attention's result, the weights.
        """
        places = {buffer: (1 + buffer, 0) for buffer in range(inputs)}
        self._made = []
        for result in self._results:
            buffer = recorder.buffers[result.operand.buffer]
            if buffer.given:
                raise Unrecordable("a result that is an argument")
            if result.operand.buffer not in places:
                places[result.operand.buffer] = 1 + inputs + len(self._made), 0
                self._made.append(result.alone(buffer.bytes))
            result.made = places[result.operand.buffer][0] - 1 - inputs
            if self._made[result.made][2] is not result.dtype:
                raise Unrecordable("results of several dtypes in one memory")
            result.whole = self._made[result.made][:2] == result.view[:2]
        self._attention_base = 1 + inputs + len(self._made)
        places[attention] = self._attention_base, 0
        places |= {inputs + i: (self._attention_base + 1 + i, 0) for i in range(len(self._weights))}
        scratch = _FreeList()
        in_use: list[tuple[int, int, int]] = []  # last operation, offset, size
        for first, number in sorted((buffer.first, number) for number, buffer in enumerate(recorder.buffers)):
            if number in places or first < 0:
                continue
            for ended in [each for each in in_use if each[0] < first]:
                scratch.give_back(*ended[1:])
                in_use.remove(ended)
            size = -(-recorder.buffers[number].bytes // ALIGNMENT) * ALIGNMENT
            offset = scratch.take(size)
            in_use.append((recorder.buffers[number].last, offset, size))
            places[number] = 0, offset
        self._scratch_bytes = scratch.size
        program = extension.native.LayerProgram(native_products.instruction_set())
        for operation in recorder.operations:
            _add(program, operation, places)
        self._program = program

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any], attention: RecordedAttention, out: Tensor) -> None:
        """Raise `Unrecordable` unless the program's results are the recorded ones."""
        addresses = self.call.addresses(args, kwargs)
        if addresses is None:
            raise Unrecordable("arguments that differ from themselves")
        given: list[Tensor] = []

        def attend(index: int, *tensors: Any) -> Tensor:
            given.extend(tensors[:3])
            return attention.out

        result = self.run(addresses, attend)
        results = (*given, result[0] if self._tuple else result)
        for mine, own in zip(results, (*attention.given, out), strict=True):
            largest = own.abs().amax().float()
            difference = (mine.float() - own.float()).abs().amax()
            if mine.dtype is not own.dtype or not difference <= TOLERANCE[own.dtype] * largest:
                raise Unrecordable(f"its results differ: by {float(difference):.3g} of {float(largest):.3g}")


class _Result:
    """A tensor that a program makes: the query, keys, values, or the layer's result.

    Attributes:
        made: which of the program's new buffers it lies in.
        whole: whether that is made as this result.
    """

    def __init__(self, operand: Operand) -> None:
        self.operand, self.dtype = operand, operand.dtype
        self.made = 0
        self.whole = False
        size = operand.dtype.itemsize
        self.view = operand.shape, tuple(stride // size for stride in operand.strides), operand.offset // size

    def alone(self, size: int) -> Made:
        """Return how to make a buffer of so many bytes: as this result, if it fills it."""
        shape, strides, _ = self.view
        elements = size // self.dtype.itemsize
        filled = (
            math.prod(shape) == elements and sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) == elements - 1
        )
        return (shape, strides, self.dtype) if filled else ((elements,), (1,), self.dtype)

    def of(self, made: list[Tensor]) -> Tensor:
        """Return it in new buffers."""
        return made[self.made] if self.whole else made[self.made].as_strided(*self.view)


class RecordedAttention:
    """The pass of a layer that is recorded: its attention is random.

    Attributes:
        index: the layer's number, `None` until it attends.
        given: query, keys and values.
        operations: recorded before it.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.index: int | None = None
        self.params: AttentionParams
        self.given: tuple[Tensor, Tensor, Tensor]
        self.out: Tensor
        self.buffer = -1
        self.operations = 0

    def attention(self, index: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        recorder = self._recorder
        if self.index is not None:
            recorder.reason = "it attends twice"
        self.index, self.given, self.params = index, (query, keys, values), params
        self.operations = len(recorder.operations)
        recorder.pause()
        batch, heads, tokens, _ = query.shape
        generator = torch.Generator().manual_seed(index)
        shape = batch, tokens, heads, values.shape[-1]
        self.out = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(query.dtype)
        self.buffer = recorder.give(self.out)
        recorder.go_on()
        return self.out


class _FreeList:
    """Scratch memory: first fit."""

    def __init__(self) -> None:
        self.size = 0
        self._holes: list[tuple[int, int]] = []  # offset, size

    def take(self, size: int) -> int:
        for i, (offset, hole) in enumerate(self._holes):
            if hole >= size:
                self._holes[i : i + 1] = [(offset + size, hole - size)] if hole > size else []
                return offset
        self.size += size
        return self.size - size

    def give_back(self, offset: int, size: int) -> None:
        holes: list[tuple[int, int]] = []
        for start, length in sorted([*self._holes, (offset, size)]):
            if holes and sum(holes[-1]) == start:
                holes[-1] = holes[-1][0], holes[-1][1] + length
            else:
                holes.append((start, length))
        self._holes = holes


def _add(program: Any, operation: Operation, places: dict[int, tuple[int, int]]) -> None:
    """Add an operation to a native program. places: buffer -> (base, bytes into it)."""

    def placed(operand: Operand) -> tuple[int, int, int, list[int]]:
        buffer, dtype, offset, strides = numbers_of(operand, len(operation.sizes))
        base, start = places.get(buffer, (buffer, 0))
        return base, dtype, start + offset, strides

    inputs = [placed(each) for each in operation.inputs]
    program.add(operation.kind, operation.op, list(operation.sizes), placed(operation.out), inputs, operation.number)


def _weights(layer: nn.Module) -> Iterator[Tensor]:
    yield from layer.parameters()
    yield from layer.buffers()
