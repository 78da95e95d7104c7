"""Whether a model computes the keys and values that a session holds: the beginning of its tokens is run once more, and compared.

For sessions of the first form, which kept a digest of the whole configuration: a later transformers, or another label, changes it,
and nothing says whether RoPE changed too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specache.errors import SessionError
from specache.identity.wrappers import unwrapped
from specache.sequence import Sequence

TOKENS = 512  # of the beginning: enough for RoPE of low frequencies to show
_FIRST_LAYER = {torch.float32: 1e-3, torch.float64: 1e-3}  # most relative error of one key dimension; else in 16 bits
_OTHER_LAYERS = {torch.float32: 1e-2, torch.float64: 1e-2}  # most relative error of all rows
_FIRST_LAYER_16, _OTHER_LAYERS_16 = 2e-2, 5e-2


def check_rows(name: str, model: Any, sequence: Sequence, device: torch.device) -> None:
    """Refuse a model that computes other rows than those stored.

    Raises:
        SessionError: it does.
    """
    if sequence.length and not _computes_the_same(model, sequence, device):
        raise SessionError(
            f"The session {name!r} belongs to a {type(unwrapped(model)).__name__} of another configuration, or with another adapter. "
            "Load the model that it was made with, or use another session."
        )


@torch.no_grad()
def _computes_the_same(model: Any, sequence: Sequence, device: torch.device) -> bool:
    """Whether a model's stock forward pass gives the stored rows of the first tokens, up to the rounding of another chunk size."""
    model = unwrapped(model)
    ids = torch.tensor([sequence.token_ids[:TOKENS]], device=device)
    computed = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    for place, index in enumerate(sorted(sequence.compressed)):
        keys, values = (tensor.to(device) for tensor in sequence.tier.read(index, 0, ids.shape[1]))  # [Hkv, n, D]
        layer = computed.layers[index]
        if keys.shape != layer.keys[0].shape or not _close(keys, layer.keys[0], values, layer.values[0], first=place == 0):
            return False
    return True


def _close(keys: Tensor, own_keys: Tensor, values: Tensor, own_values: Tensor, first: bool) -> bool:
    if first:
        errors = (keys - own_keys).float().norm(dim=1) / own_keys.float().norm(dim=1).clamp(min=1e-6)  # [Hkv, D]
        if bool(errors.max() > _FIRST_LAYER.get(keys.dtype, _FIRST_LAYER_16)):
            return False
    most = _OTHER_LAYERS.get(keys.dtype, _OTHER_LAYERS_16)
    pairs = ((keys, own_keys), (values, own_values))
    return all(bool((a - b).float().norm() <= most * b.float().norm()) for a, b in pairs)
