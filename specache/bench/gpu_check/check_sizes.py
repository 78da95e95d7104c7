"""What the parts run: the sizes for a GPU, smaller ones where it has less memory, tiny ones on a
CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from specache.bench.compute_device import CUDA
from specache.bench.shapes import Shape, Weights

GB = 10**9
FULL_SIZE = 40 * GB  # GPU memory for which the sizes are made
TINY = Shape("tiny", 2, 64, 96, 4, 2, 16, 97, 10_000.0, True)
JOINING = Shape("joining", 4, 256, 512, 8, 2, 64, 997, 10_000.0, True)  # small enough for 2,000 tokens on a CPU


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run.

    Attributes:
        notes: what is smaller than it should be, and why.
        generate: shape of the model that generates; `prompts` and `new_tokens` of its answers.
        joining: shape of the model whose sequences join and leave; `joined` sequences that gain
            `joined_tokens` each.
        memory: shape whose memory is planned and measured, at `memory_context` and `memory_batch`.
        layer: shape of the layer that is timed, at `layer_cells` of (context, batch).
        models: whole decodes: (shape, context, batch).
        paper: shape, context, and the bytes that weights and cache may take together.
    """

    generate: str = "smollm2-135m"
    prompts: tuple[int, ...] = (430, 250)
    new_tokens: int = 40
    joining: Shape = JOINING
    joined: int = 10
    joined_tokens: int = 200
    memory: str = "llama-3.2-1b"
    memory_context: int = 16384
    memory_batch: int = 4
    memory_prompt: int = 6000
    layer: str = "llama-3-8b"
    layer_cells: tuple[tuple[int, int], ...] = ((32768, 8), (32768, 1), (131072, 8), (131072, 1), (8192, 8), (8192, 1))
    repeat: int = 15
    models: tuple[tuple[str, int, int], ...] = (("llama-3-8b", 32768, 1), ("llama-3.2-1b", 32768, 8), ("llama-3.2-1b", 32768, 1))
    steps: int = 10
    weights: Weights = Weights.BF16
    paper: str = "mistral-7b"
    paper_context: int = 32768
    paper_bytes: int = 48 * GB
    transfer_bytes: int = 1 << 30
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def on(cls, device: str) -> Sizes:
        """Return the sizes for a device, as much memory as it has free."""
        if device != CUDA:
            return CPU_SIZES
        return cls().within(torch.cuda.mem_get_info()[0])

    def within(self, free: int) -> Sizes:
        """Return sizes for so many bytes of free GPU memory, with notes on what is smaller."""
        found, notes = self, []
        if free < FULL_SIZE:
            share = free / FULL_SIZE
            cells = tuple((context, batch) for context, batch in self.layer_cells if context * batch <= (1 << 20) * share)
            models = tuple(one for one in self.models if _needed(one) <= free) or (("smollm2-135m", 8192, 1),)
            left_out = [
                f"{shape} at {context:,} x {batch}"
                for shape, context, batch in self.models
                if _needed((shape, context, batch)) > free
            ]
            gone = [f"{context:,} x {batch}" for context, batch in self.layer_cells if (context, batch) not in cells]
            context = max(2048, int(self.memory_context * min(1.0, 2 * share)) // 1024 * 1024)
            found = replace(self, layer_cells=cells or ((8192, 1),), models=models, memory_context=context)
            notes.append(
                f"{free / GB:.0f} GB of GPU memory are free, below the {FULL_SIZE / GB:.0f} GB that the sizes are made for. Left "
                f"out: one layer at {', '.join(gone) or 'no size'}; whole decodes of {', '.join(left_out) or 'no model'}."
            )
        if free < self.paper_bytes:
            limit = int(free * 0.9)
            found = replace(found, paper_bytes=limit)
            notes.append(f"The paper's table is made within {limit / GB:.0f} GB, not {self.paper_bytes / GB:.0f}.")
            if limit < 20 * GB:
                found = replace(found, paper="llama-3.2-1b", paper_context=8192)
                notes.append("Its model is Llama-3.2-1B's shape at 8,192 tokens: the 7B weights alone take 15 GB.")
        return replace(found, notes=(*self.notes, *notes))


def _needed(one: tuple[str, int, int]) -> int:
    """Return about how many bytes a whole decode beside transformers' cache takes."""
    shape, context, batch = one
    weights, row = {"llama-3-8b": (16.1 * GB, 131072)}.get(shape, (2.5 * GB, 32768))
    return int(weights + 1.6 * row * context * batch + GB)


CPU_SIZES = Sizes(
    generate="tiny",
    prompts=(60, 41),
    new_tokens=20,
    joining=TINY,
    joined=4,
    joined_tokens=15,
    memory="tiny",
    memory_context=400,
    memory_batch=2,
    memory_prompt=300,
    layer="tiny",
    layer_cells=((256, 2), (128, 1)),
    repeat=2,
    models=(("tiny", 256, 2),),
    steps=2,
    weights=Weights.FP32,
    paper="tiny",
    paper_context=256,
    paper_bytes=4_000_000,
    transfer_bytes=1 << 20,
    notes=("On a CPU all sizes are tiny: nothing here says how fast anything is.",),
)
