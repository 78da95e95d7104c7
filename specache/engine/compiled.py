"""Which decode steps run compiled (`compiled_layers`), and when their code is made or loaded.

An answer's steps are all compiled or all eager: the choice is made before its first step. Code that
the answer needs is compiled then, or loaded from the cache folder. With `background=True` only the
loading takes place there. What is not in the folder is compiled by a child process, while this
answer runs eagerly.
"""

from __future__ import annotations

import functools
import os
import shutil
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from specache.config import Policy
from specache.engine import compiled_layers
from specache.engine.compile_cache import CompileCache, described_digest
from specache.engine.compile_job import CompileJob
from specache.engine.compiled_layers import CompiledLayers, Variant, decoder_layers
from specache.engine.traced import traced_layers
from specache.errors import ConfigError
from specache.model.identity.wrappers import is_compiled_inside, unwrapped
from specache.model.info import inspect_model
from specache.platform import forks, modes, private_torch

WarmUp = Callable[[CompiledLayers, int, int], None]  # (layers, tokens per sequence, sequences)
COMPILERS = ("g++", "clang++")
MOST_ATTEMPTS = 4  # child processes for one model: further variants, and damaged files
LONG_ANSWER = 512  # new tokens from which on loading compiled code (seconds) pays

_models: weakref.WeakKeyDictionary[Any, CompiledModel] = weakref.WeakKeyDictionary()
_lock = forks.lock()  # one thread at a time compiles or loads: the compiler's folder is the process's


def compile_decode(model: Any, background: bool = False) -> None:
    """Compile the model's decode steps from the next answer on. Prefill is not compiled.

    The layers of one kind share a graph, one per number of tokens per sequence, for one sequence
    and for several. Longer contexts and other batch sizes do not compile again. The code is kept in
    the cache folder, and other processes load it in a few seconds. Steps with policy `full` are not
    compiled: they are the yardstick. In 16 bits compiled steps round differently.

    Args:
        background: compile in a child process of low priority, and decode eagerly meanwhile. The
            first answer that begins when the code is there runs compiled. The child ends with this
            process. If it fails, there is one warning, and answers stay eager. CPU only.

    Raises:
        ConfigError: there is no C++ compiler, or the model's layers are no fixed graph.
        UnsupportedModelError: specache cannot run this model.
    """
    model = unwrapped(model)
    reason = uncompilable_reason(model)
    if reason is None and background and inspect_model(model).device.type != "cpu":
        reason = "in the background it takes a model on the CPU. Leave out background"
    if reason is not None:
        raise ConfigError(f"{type(model).__name__} cannot be compiled: {reason}.")
    with _lock:
        _models[model] = CompiledModel(model, background)


def uncompilable_reason(model: Any) -> str | None:
    """Return why a model's steps cannot be compiled here, and what to do, or `None`."""
    model = unwrapped(model)
    info = inspect_model(model)
    if info.rope_switch is not None:
        return f"with {info.rope_type} RoPE its frequencies depend on the length. Leave out compiling"
    if is_compiled_inside(model):
        return "it is, or parts of it are, compiled already. Leave out one of the two"
    if next(decoder_layers(model), None) is None:
        return "it has no list of decoder layers whose forward is its own. Leave out compiling"
    return _missing_compiler() if info.device.type == "cpu" else None


def is_faster(model: Any) -> bool:
    """Return whether commands compile this model by themselves: on a CPU, where it can be compiled.

    Not where layers run as programs (`specache.engine.traced`), which are faster, nor with float32
    weights, where compiled steps were as fast as eager ones (docs/results.md: 81 against 80 ms,
    SmolLM2).
    """
    model = unwrapped(model)
    if traced_layers.may_record(model) or inspect_model(model).device.type != "cpu" or uncompilable_reason(model) is not None:
        return False
    inside = (module for _, layer in decoder_layers(model) for module in layer.modules())
    return not any(type(module) is nn.Linear and module.weight.dtype is torch.float32 for module in inside)


def is_cached(model: Any, policy: Policy, sequences: int) -> bool:
    """Return whether the steps of an answer can be loaded without compiling."""
    cache = CompileCache.of(described_digest(unwrapped(model)))
    return cache is not None and {variant.name for variant in needed(policy, sequences)} <= cache.variants()


def needed(policy: Policy, sequences: int) -> set[Variant]:
    """Return the variants of all steps of an answer: sequences end one by one."""
    tokens = (1, 2) if policy.drafts else (1,)
    return {Variant(count, several) for count in tokens for several in ((False, True) if sequences > 1 else (False,))}


def begin_answer(model: Any, policy: Policy, sequences: int, warm_up: WarmUp) -> tuple[CompiledLayers | None, str | None]:
    """Return the layers with which the next answer's steps run compiled, or `None` for eager ones.

    It compiles or loads what is missing. The model must be attached.

    Args:
        warm_up: runs one step of a variant.

    Returns:
        the layers, and, if they are missing, why the model could not be compiled in the background.

    Raises:
        ConfigError: compiling failed (not in the background).
    """
    compiled = _models.get(model)
    if compiled is None or policy is Policy.FULL:
        return None, None
    with _lock:
        return compiled.begin_answer(model, needed(policy, sequences), warm_up)


def install(model: Any) -> None:
    """Prepare the layers of an attached model, if it compiles."""
    if model in _models:
        compiled_layers.install(model)


class CompiledModel:
    """What is known of one model's compiled steps in this process."""

    def __init__(self, model: Any, background: bool) -> None:
        self._background = background
        self._layers: CompiledLayers | None = None
        self._ready: set[tuple[str, modes.Modes, Variant]] = set()
        self._job: CompileJob | None = None
        self._attempts = 0
        self._failure: str | None = None

    def begin_answer(self, model: Any, variants: set[Variant], warm_up: WarmUp) -> tuple[CompiledLayers | None, str | None]:
        described, mode = described_digest(model), modes.of_caller()
        missing = sorted(variant for variant in variants if (described, mode, variant) not in self._ready)
        if missing:
            cache = CompileCache.of(described)
            if self._background and not self._is_loadable(model, cache, missing, mode):
                return None, self._failure
            try:
                self._compile(model, cache if mode == modes.PLAIN else None, missing, warm_up)
            except Exception as error:
                reason = one_line(error)
                if self._background:
                    self._fail(model, reason)
                    return None, self._failure
                if not isinstance(error, private_torch.compiler_error()):
                    raise
                raise ConfigError(f"PyTorch cannot compile this model here. Leave out compiling. It said: {reason}") from error
            self._ready |= {(described, mode, variant) for variant in missing}
        compiled_layers.install(model)
        return self._layers, None

    def _is_loadable(self, model: Any, cache: CompileCache | None, missing: list[Variant], mode: modes.Modes) -> bool:
        """Return whether the cache folder has all variants. If not, have them compiled, once."""
        if self._failure is not None or mode != modes.PLAIN:
            return False
        if cache is None:
            self._fail(model, "there is no cache folder")
            return False
        if {variant.name for variant in missing} <= cache.variants():
            return True
        if self._job is None and (reason := cache.failure()) is not None:
            self._fail(model, reason)
        elif self._job is None or (self._job.finished and self._job.failure is None and self._attempts < MOST_ATTEMPTS):
            self._attempts += self._job is None or self._job.ran
            try:
                self._job = CompileJob.start(model, cache, missing)
            except Exception as error:  # the model cannot be pickled, or no process be started
                self._fail(model, one_line(error))
        elif self._job.finished:
            self._fail(model, self._job.failure or "what was compiled is not in the cache folder")
        return False

    def _compile(self, model: Any, cache: CompileCache | None, variants: list[Variant], warm_up: WarmUp) -> None:
        cached = set() if cache is None else cache.variants()
        new = [variant for variant in variants if variant.name not in cached]
        if self._layers is None:
            self._layers = CompiledLayers(model, serial=not new)
        compiled_layers.install(model)
        with nullcontext() if cache is None else cache.used():
            self._layers.prepare(variants, functools.partial(warm_up, self._layers))
        if cache is not None and new:
            cache.record(variants)

    def _fail(self, model: Any, reason: str) -> None:
        self._failure = reason
        warnings.warn(
            f"{type(model).__name__} was not compiled, and its decode steps stay eager: {reason}", RuntimeWarning, stacklevel=2
        )


def one_line(error: BaseException) -> str:
    """Return an error as one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _missing_compiler() -> str | None:
    named = os.environ.get("CXX")
    if any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        return None
    return (
        f"compiling needs a C++ compiler, and there is {f'no {named} (CXX)' if named else 'neither g++ nor clang++'}. Install "
        "g++ (with the headers of Python), set CXX, or leave out compiling"
    )
