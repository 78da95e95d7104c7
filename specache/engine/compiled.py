"""The decode step's forward pass as one compiled graph (`torch.compile`), with our attention as one operator in every layer.

A pass is a new Python object at every step, which the compiler must not see: it would compile again. The graph carries a mark
instead, and the operator asks for the pass that is running now.
"""

from __future__ import annotations

import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from specache.attention.dense import AttentionParams
from specache.engine import forward_pass as passes
from specache.engine.forward_pass import ForwardPass
from specache.errors import ConfigError
from specache.model.identity.wrappers import unwrapped
from specache.model.info import inspect_model
from specache.platform import private_torch

Step = Callable[[Tensor, Tensor], Tensor]  # (token ids [A, n], positions [A, n]) -> float32 logits [A, n, V]

CURRENT_PASS = object()  # stands for the pass in the graph
COMPILERS = ("g++", "clang++")

_steps: weakref.WeakKeyDictionary[Any, Step] = weakref.WeakKeyDictionary()
_running = threading.local()  # .state: the pass that runs in this thread
_library = torch.library.Library("specache", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor keys, Tensor values, int layer, float scaling, float? softcap, Tensor? sinks) -> Tensor"
)


def compile_decode(model: Any) -> None:
    """Compile the model's decode steps from now on; prefill stays as it is.

    The compiler runs at the first step (half a minute for 30 layers), once per number of rows, for one sequence and for several;
    not again as contexts grow or as a batch changes its size.

    Raises:
        ConfigError: there is no C++ compiler, or the model's step is no fixed graph.
        UnsupportedModelError: specache cannot run this model.
    """
    model = unwrapped(model)
    info = inspect_model(model)
    if info.rope_switch is not None:
        raise ConfigError(
            f"{type(model).__name__} cannot be compiled: with {info.rope_type} RoPE its frequencies depend on the length. "
            "Leave out compiling."
        )
    if info.device.type == "cpu":
        _check_compiler()
    _steps[model] = torch.compile(_step_of(model), options={"size_asserts": False})  # 700 of them in a step of 30 layers


def compiled_step(model: Any) -> Step | None:
    """The model's compiled decode step, if it was asked for."""
    step = _steps.get(unwrapped(model))
    return None if step is None else _with_fixed_rows(step)


@contextmanager
def running(state: ForwardPass) -> Iterator[None]:
    """`attend` is served by `state` inside the block, in this thread."""
    previous = getattr(_running, "state", None)
    _running.state = state
    try:
        yield
    finally:
        _running.state = previous


def attend(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The running pass's attention as an operator: shapes as `ForwardPass.attention`, contiguous."""
    out: Tensor = torch.ops.specache.attend(query, keys, values, layer, scaling, softcap, sinks)
    return out


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    state: ForwardPass = _running.state
    params = AttentionParams(scaling=scaling, softcap=softcap, sinks=sinks)
    return passes.attend(state, layer, query, keys, values, params)


def _attend_fake(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, values.shape[-1])


def _step_of(model: Any) -> Step:
    """What is compiled. It holds its model weakly: `_steps` would keep it alive otherwise."""
    reference: Callable[[], Any] = weakref.ref(model)

    def step(token_ids: Tensor, position_ids: Tensor) -> Tensor:
        output = reference()(
            input_ids=token_ids,
            position_ids=position_ids,
            use_cache=False,
            return_dict=True,
            logits_to_keep=0,  # of every row; as a number it would be compiled in
            specache=CURRENT_PASS,
        )
        return output.logits.float()

    return step


def _with_fixed_rows(step: Step) -> Step:
    """One graph for any number of sequences above one, and one per number of rows."""

    def run(token_ids: Tensor, position_ids: Tensor) -> Tensor:
        for tensor in (token_ids, position_ids):
            private_torch.fix_size(tensor, 1)
            if tensor.shape[0] > 1:
                private_torch.free_size(tensor, 0)
        return step(token_ids, position_ids)

    return run


def _check_compiler() -> None:
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        raise ConfigError(
            f"compiling needs a C++ compiler, and there is {f'no {named} (CXX)' if named else 'neither g++ nor clang++'}. Install "
            "g++ (with the headers of Python), set CXX, or leave out compiling."
        )


_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("specache::attend", _attend_fake, lib=_library)
