"""Which model and tokenizer a session belongs to: keys and values of one mean nothing to another."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch
from torch import Tensor

from specache.errors import SessionError
from specache.model import inspect_model
from specache.sessions.manifest import Identity

SAMPLED_ELEMENTS = 1024  # of every weight tensor
_NO_MATTER = {  # of a configuration: where it was loaded from and how it is run, which other fields cover or nothing depends on
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
}


def identify(model: Any, tokenizer: Any = None) -> Identity:
    """The fingerprints of a model and its tokenizer."""
    info = inspect_model(model)
    return Identity(
        model=type(model).__name__,
        config=_digest(json.dumps(_relevant(model.config.to_dict()), sort_keys=True, default=str).encode()),
        weights=_weights(model),
        dtype=str(info.dtype).removeprefix("torch."),
        tokenizer=None if tokenizer is None else _tokenizer(tokenizer),
        byte_order=sys.byteorder,
    )


def check_identity(name: str, stored: Identity, mine: Identity) -> Identity:
    """The identity that the session has from now on.

    Raises:
        SessionError: it belongs to another model, tokenizer, number format or kind of machine.
    """

    def refuse(what: str, advice: str) -> SessionError:
        return SessionError(f"The session {name!r} {what}. {advice}, or use another session.")

    if stored.byte_order != mine.byte_order:
        raise refuse(
            f"was written on a {stored.byte_order}-endian machine and this one is {mine.byte_order}-endian", "Use it there"
        )
    if stored.model != mine.model:
        raise refuse(f"belongs to a {stored.model}, and this model is a {mine.model}", "Load the model that it was made with")
    if stored.config != mine.config:
        raise refuse(f"belongs to a {stored.model} of another configuration", "Load the model that it was made with")
    if stored.dtype != mine.dtype:
        raise refuse(
            f"holds {stored.dtype} pairs and this model computes in {mine.dtype}", f"Load the model with dtype {stored.dtype}"
        )
    if stored.weights != mine.weights:
        raise refuse(
            f"belongs to a {stored.model} of the same shape with other weights, or with weights in another format",
            "Load the model that it was made with, its weights in the same format",
        )
    if None not in (stored.tokenizer, mine.tokenizer) and stored.tokenizer != mine.tokenizer:
        raise refuse("was made with another tokenizer, so its tokens mean other text", "Load the tokenizer that it was made with")
    return mine if mine.tokenizer is not None else stored


def _relevant(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _relevant(value) for key, value in config.items() if key not in _NO_MATTER}
    return config


def _weights(model: Any) -> str:
    """Of every tensor: name, shape, dtype, and elements spread evenly over it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
            digest.update(_sample(tensor))
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    count = tensor.numel()
    if count == 0:
        return b""
    index = torch.linspace(0, count - 1, min(count, SAMPLED_ELEMENTS), dtype=torch.float64).long().to(tensor.device)
    return tensor.detach().take(index).cpu().view(torch.uint8).numpy().tobytes()


def _tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    text = backend.to_str()
    start = text.find('"added_tokens"')  # before it: padding and truncation, which are those of the last call
    return _digest(text[max(start, 0) :].encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
