"""Hooks and replaced forwards that change what a model computes."""

from __future__ import annotations

from typing import Any

import torch


def steer(model: Any, strength: Any) -> Any:
    """Add a vector to a layer's output, as activation steering does."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        return output + strength if isinstance(output, torch.Tensor) else (output[0] + strength, *output[1:])

    return model.model.layers[1].register_forward_hook(hook)


def forward_of_ones_own(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    old = mlp.forward
    mlp.forward = lambda hidden: old(hidden) * 1.5 if hidden.device.type in {"cpu", "cuda", "mps"} else hidden


CHANGES = {
    "a hook": lambda m: steer(m, 0.5),
    "a hook before a forward": lambda m: m.model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "a forward": forward_of_ones_own,
}
