"""The model and tokenizer that a session belongs to.

Keys and values of one model are useless to another.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from typing import Any

from specache.errors import SessionError
from specache.model.identity.code import code_digest
from specache.model.identity.content import adapters_digest, weights_digest
from specache.model.identity.model_settings import conflict, relevant_settings
from specache.model.identity.wrappers import unwrapped
from specache.model.info import inspect_model
from specache.sessions.first_identity import first_config_digest, first_weights_digests
from specache.sessions.manifest import Identity

PRESENT = "2:"  # prefix of digests and settings in the present form


def identify(model: Any, tokenizer: Any = None) -> Identity:
    """Return the fingerprints of a model, independent of wrappers, and of its tokenizer."""
    info = inspect_model(model)
    return Identity(
        model=type(unwrapped(model)).__name__,
        config=PRESENT + json.dumps(relevant_settings(unwrapped(model)), sort_keys=True),
        weights=PRESENT + weights_digest(model),
        dtype=str(info.dtype).removeprefix("torch."),
        tokenizer=None if tokenizer is None else _tokenizer(tokenizer),
        byte_order=sys.byteorder,
        adapters=adapters_digest(model),
        code=code_digest(unwrapped(model)),
    )


def check_identity(name: str, stored: Identity, mine: Identity, model: Any) -> Identity:
    """Check a session's identity and return the identity to save from now on.

    If `needs_probe` is true, the stored rows must be compared as well.

    Raises:
        SessionError: the session belongs to another model, tokenizer, dtype, byte order, or to
            other adapters.
    """

    def refuse(what: str, advice: str) -> SessionError:
        return SessionError(f"The session {name!r} {what}. {advice}, or use another session.")

    if stored.byte_order != mine.byte_order:
        raise refuse(
            f"was written on a {stored.byte_order}-endian machine and this one is {mine.byte_order}-endian", "Use it there"
        )
    if stored.model != mine.model:
        raise refuse(f"belongs to a {stored.model}, and this model is a {mine.model}", "Load the model that it was made with")
    if stored.config.startswith(PRESENT) and (difference := conflict(_settings(stored), _settings(mine))):
        raise refuse(f"belongs to a {stored.model} of another configuration: {difference}", "Load the model that it was made with")
    if stored.dtype != mine.dtype:
        raise refuse(
            f"holds {stored.dtype} pairs and this model computes in {mine.dtype}", f"Load the model with dtype {stored.dtype}"
        )
    if not _same_weights(stored, mine, model):
        raise refuse(
            f"belongs to a {stored.model} of the same shape with other weights, or with weights in another format",
            "Load the model that it was made with, its weights in the same format",
        )
    if stored.adapters is not None and stored.adapters != mine.adapters:
        raise refuse(
            f"was made with {_adapter_text(stored)}, and this model runs with {_adapter_text(mine)}{_same_names(stored, mine)}",
            "Activate what it was made with",
        )
    if None not in (stored.tokenizer, mine.tokenizer) and stored.tokenizer != mine.tokenizer:
        raise refuse("was made with another tokenizer, so its tokens mean other text", "Load the tokenizer that it was made with")
    return mine if mine.tokenizer is not None else replace(mine, tokenizer=stored.tokenizer)


def needs_probe(stored: Identity, mine: Identity, model: Any) -> bool:
    """Return True if an identity alone does not tell whether a session belongs to a model.

    So it is if hooks or replaced forwards differ, which may change keys or only record; and of
    configurations if only one of them has some field, or in the first form if the digests differ.
    """
    if stored.code != mine.code:
        return True
    if stored.config.startswith(PRESENT):
        return stored.config != mine.config
    return stored.config != first_config_digest(model) or bool(mine.adapters)


def _same_weights(stored: Identity, mine: Identity, model: Any) -> bool:
    if stored.weights.startswith(PRESENT):
        return stored.weights == mine.weights
    return stored.weights in first_weights_digests(model)


def _settings(identity: Identity) -> dict[str, Any]:
    """Return the settings that keys and values depend on.

    If they cannot be parsed, return only an unknown model type.
    """
    try:
        settings = json.loads(identity.config.removeprefix(PRESENT))
    except (ValueError, RecursionError):
        settings = None
    return settings if isinstance(settings, dict) else {"model_type": None}


def _adapter_text(identity: Identity) -> str:
    names = (identity.adapters or "").rpartition(":")[0]
    return f"the adapter {names}" if names else "no adapter"


def _same_names(stored: Identity, mine: Identity) -> str:
    return " with other weights or scales" if _adapter_text(stored) == _adapter_text(mine) else ""


def _tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    text = backend.to_str()
    start = text.find('"added_tokens"')  # before it: padding and truncation, left over from the last call
    return _digest(text[max(start, 0) :].encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
