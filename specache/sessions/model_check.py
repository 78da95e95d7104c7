"""Check that a model computes a session's keys and values, by recomputing the first tokens.

Needed for sessions of the first version, whose digest of the whole configuration changes with a
transformers release or a label, if a release began or ceased to write down a field, and if the
model runs with other hooks or forwards than before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specache.cache.sequence import Sequence
from specache.errors import SessionError
from specache.model.identity.wrappers import unwrapped

TOKENS = 512  # tokens recomputed: enough to reveal RoPE of low frequencies
EXACT_TOKENS = 64  # tokens before which hardly any was decoded over a low-bit copy
_WIDE = (torch.float32, torch.float64)


def check_rows(name: str, model: Any, sequence: Sequence, device: torch.device) -> None:
    """Check that a model computes the stored rows.

    Raises:
        SessionError: it computes others.
    """
    if sequence.length and not _computes_the_same(model, sequence, device):
        raise SessionError(
            f"The session {name!r} belongs to a {type(unwrapped(model)).__name__} of another configuration, with another adapter, "
            "or with other hooks or replaced forwards. Load it and put on it what it had then, or use another session."
        )


@torch.no_grad()
def _computes_the_same(model: Any, sequence: Sequence, device: torch.device) -> bool:
    """Return True if a stock forward pass gives the stored rows of the first tokens, up to
    rounding.

    Keys of layer 0 do not depend on attention, so all of them must agree. Those of other layers
    agree where no earlier token was decoded over a low-bit copy: most of the first ones.
    """
    ids = torch.tensor([sequence.token_ids[:TOKENS]], device=device)
    computed = unwrapped(model)(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    for index in sorted(sequence.compressed):
        stored = sequence.tier.read(index, 0, ids.shape[1])  # keys and values, [Hkv, n, D] each
        own = (computed.layers[index].keys[0], computed.layers[index].values[0])
        if stored[0].shape != own[0].shape or not all(_close(a.to(device), b) for a, b in zip(stored, own, strict=True)):
            return False
        if index == 0 and not _close_everywhere(stored[0].to(device), own[0]):
            return False
    return True


def _close(stored: Tensor, own: Tensor) -> bool:
    """Return True if most of the first rows agree."""
    a, b = stored[:, :EXACT_TOKENS].float(), own[:, :EXACT_TOKENS].float()
    errors = (a - b).norm(dim=(0, 2)) / b.norm(dim=(0, 2)).clamp(min=1e-6)  # [n]
    return bool(errors.median() < (1e-2 if own.dtype in _WIDE else 5e-2))


def _close_everywhere(stored: Tensor, own: Tensor) -> bool:
    """Return True if every key channel agrees: another RoPE frequency changes two of them."""
    a, b = stored.float(), own.float()
    errors = (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-6)  # [Hkv, D]
    return bool(errors.max() < (1e-3 if own.dtype in _WIDE else 2e-2))
