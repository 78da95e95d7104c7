"""Hooks and replaced forwards that change what a model computes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module


class Doubling(ModelHook):  # type: ignore[misc] # accelerate has no types
    """What accelerate runs around a forward, of a class of the user's."""

    def post_forward(self, module: Any, output: Any) -> Any:
        return output * 2


@torch.no_grad()
def doubling(module: Any, inputs: Any, output: Any) -> Any:
    """A hook that PyTorch decorates: what is called is a function of PyTorch's."""
    return output * 2


def steer(model: Any, strength: Any) -> Any:
    """Add a vector to a layer's output, as activation steering does."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        return output + strength if isinstance(output, torch.Tensor) else (output[0] + strength, *output[1:])

    return model.model.layers[1].register_forward_hook(hook)


def forward_of_ones_own(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    old = mlp.forward
    mlp.forward = lambda hidden: old(hidden) * 1.5 if hidden.device.type in {"cpu", "cuda", "mps"} else hidden


def decorated_forward(model: Any) -> None:
    forward_of_ones_own(model)
    mlp = model.model.layers[1].mlp
    mlp.forward = torch.inference_mode()(mlp.forward)


CHANGES = {
    "a hook": lambda m: steer(m, 0.5),
    "a hook before a forward": lambda m: m.model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "a forward": forward_of_ones_own,
    "a hook that PyTorch decorates": lambda m: m.model.layers[1].mlp.register_forward_hook(doubling),
    "a forward that PyTorch decorates": decorated_forward,
    "a hook of accelerate": lambda m: add_hook_to_module(m.model.layers[1].mlp, Doubling()),
}
