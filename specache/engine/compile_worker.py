"""The child process of `compile_job`: it compiles a model's decode steps and notes the result."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specache.engine.compile_cache import CompileCache
    from specache.engine.compiled_layers import Variant

LONGEST = 3600  # seconds after which a compiler that hangs is ended


def main(request: str) -> None:
    """Compile what the file `request` says, and record the variants, or why it failed."""
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.nice(10)
    signal.alarm(LONGEST)
    body = Path(request).read_bytes()
    Path(request).unlink(missing_ok=True)
    import torch

    from specache.engine.compile_cache import CompileCache
    from specache.engine.compiled import one_line
    from specache.engine.compiled_layers import Variant

    code = 0
    folder = Path(request).parent
    cache = CompileCache(folder)
    try:
        asked = pickle.loads(body)
        torch.set_num_threads(asked["threads"])
        _compile(asked["model"], cache, [Variant(*variant) for variant in asked["variants"]])
    except Exception as error:
        cache.record_failure(one_line(error))
        code = 1
    sys.stdout.flush()
    os._exit(code)  # the compiler's threads and the waiting one end with the process


def _compile(model: Any, cache: CompileCache, variants: list[Variant]) -> None:
    from specache.engine.attention_hook import attached, warm_up
    from specache.engine.compiled_layers import CompiledLayers, install
    from specache.platform import modes

    with modes.ours(), attached(model), cache.used():
        install(model)
        layers = CompiledLayers(model, serial=True)
        layers.prepare(variants, lambda tokens, sequences: warm_up(model, layers, tokens, sequences))
    cache.record(variants)


def _end_with(parent: int) -> None:
    """End this process's group when the parent has ended."""
    while os.getppid() == parent:
        ready, _, _ = select.select([0], [], [], 2.0)
        if ready and not os.read(0, 1):
            break
    os.killpg(0, signal.SIGKILL)
