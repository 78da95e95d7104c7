"""The decode step's forward pass as one graph of `torch.compile`, with attention as an operator.

Each step's `ForwardPass` is a new Python object. The compiler must not see it, or it would compile
again. The graph holds a constant instead, and the operator looks up the running pass.
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

from specache.engine import forward_pass
from specache.engine.forward_pass import ForwardPass
from specache.errors import ConfigError
from specache.kernels.types import AttentionParams
from specache.model.identity.wrappers import unwrapped
from specache.model.info import inspect_model
from specache.platform import private_torch

Step = Callable[[Tensor, Tensor], Tensor]  # (token ids [A, n], positions [A, n]) -> float32 logits [A, n, V]

CURRENT_PASS = object()  # the constant in the graph that stands for the running pass
COMPILERS = ("g++", "clang++")

_steps: weakref.WeakKeyDictionary[Any, Step] = weakref.WeakKeyDictionary()
_running = threading.local()  # .state: the running pass of this thread
_library = torch.library.Library("specache", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor keys, Tensor values, int layer, float scaling, float? softcap, Tensor? sinks) -> Tensor"
)


def compile_decode(model: Any) -> None:
    """Compile the model's decode steps from now on. Prefill is not compiled.

    The compiler runs in the first steps (half a minute for 30 layers): once per number of tokens
    per sequence, for one sequence and for several. Longer contexts and other batch sizes do not
    compile again.

    Raises:
        ConfigError: there is no C++ compiler, or the model's step is not a fixed graph.
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
    _steps[model] = torch.compile(_step_of(model), options={"size_asserts": False})  # a 30-layer step would run 700


def compiled_step(model: Any) -> Step | None:
    """Return the model's compiled decode step, or `None` without `compile_decode`."""
    step = _steps.get(unwrapped(model))
    return None if step is None else _with_fixed_rows(step)


@contextmanager
def running(state: ForwardPass) -> Iterator[None]:
    """Have `attend` use `state` inside the block, in this thread."""
    previous = getattr(_running, "state", None)
    _running.state = state
    try:
        yield
    finally:
        _running.state = previous


def attend(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return the running pass's attention by the operator, as `ForwardPass.attention`."""
    out: Tensor = torch.ops.specache.attend(query, keys, values, layer, scaling, softcap, sinks)
    return out


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    state: ForwardPass = _running.state
    params = AttentionParams(scaling=scaling, softcap=softcap, sinks=sinks)
    return forward_pass.attend(state, layer, query, keys, values, params)


def _attend_fake(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, values.shape[-1])


def _step_of(model: Any) -> Step:
    """Return the function to compile. It refers to the model weakly, so that `_steps` frees it."""
    reference: Callable[[], Any] = weakref.ref(model)

    def step(token_ids: Tensor, position_ids: Tensor) -> Tensor:
        output = reference()(
            input_ids=token_ids,
            position_ids=position_ids,
            use_cache=False,
            return_dict=True,
            logits_to_keep=0,  # all rows; another number would be compiled in
            specache=CURRENT_PASS,
        )
        return output.logits.float()

    return step


def _with_fixed_rows(step: Step) -> Step:
    """Return the step with a fixed number of tokens per graph, and a free batch size above one."""

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
