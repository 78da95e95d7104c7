"""Tiny models with sessions, and digests of everything that a session's sequence holds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

import specache
from specache.cache import window_checkpoints
from specache.cache.window_layer import WindowLayer
from tests.cache.test_invariants import settings
from tests.tiny import llama, prompt

NEW = 10
WINDOW = 48
__all__ = [
    "NEW",
    "WINDOW",
    "answer",
    "checkpoints_every",
    "everything",
    "gemma",
    "llama",
    "one",
    "opened",
    "prefill",
    "prompt",
    "settings",
    "state",
]


def gemma(seed: int = 0, layers: int = 4) -> Any:
    """Gemma 2: every other layer slides over 48 tokens, scores are capped."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "initializer_range": 0.2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": WINDOW}
    tokens = {"eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 2048}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **tokens)).eval()


def opened(
    root: Path, model: Any, config: specache.SpeCacheConfig | None = None, name: str = "one", **more: Any
) -> specache.Session:
    return specache.Session(name, model, config, folder=root, **more)


def checkpoints_every(monkeypatch: Any, tokens: int) -> None:
    """Set the distance of window checkpoints, near the end of a sequence and far from it."""
    monkeypatch.setattr(window_checkpoints, "FINE", tokens)
    monkeypatch.setattr(window_checkpoints, "COARSE", tokens)


def one(root: Path, pattern: str, name: str = "one") -> Path:
    """Return the first file of a session that matches a pattern."""
    return sorted((root / name).glob(pattern))[0]


def answer(model: Any, cache: specache.SpeCache, ids: Tensor, new: int = NEW, **more: Any) -> tuple[Tensor, Tensor]:
    """Generate greedily and return (the whole sequence [1, S + new], logits [new, V])."""
    output = specache.generate(
        model,
        ids,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )
    return output.sequences, torch.cat(output.logits)


def prefill(session: specache.Session, model: Any, ids: Tensor) -> list[int]:
    """Prefill `ids` in a session and return the tokens cached at the start and after each chunk."""
    done: list[int] = []
    specache.prefill(model, ids, cache=session.cache, progress=lambda now, total: done.append(now))
    return done


def state(session: specache.Session) -> str:
    """Return a digest of everything that the sequence holds: tokens, rows, codes, residual, key
    scales, windows.
    """
    digest = hashlib.sha256()
    for name, tensor in everything(session).items():
        digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def everything(session: specache.Session) -> dict[str, Tensor]:
    """Return all that the sequence holds."""
    sequence = session.cache.sequences[0]
    held = {"tokens": torch.tensor(sequence.token_ids)}
    for index, layer in sequence.compressed.items():
        held[f"keys {index}"], held[f"values {index}"] = sequence.tier.read(index, 0, sequence.length)
        held[f"residual {index}"] = torch.stack([layer.residual_keys, layer.residual_values])
        copy = layer.table.low_bit_kv()
        for name in copy.runs[0].fields if copy.runs else ():
            held[f"{name} {index}"] = torch.cat([run.fields[name] for run in copy.runs])[: copy.length // 64]
        weights = layer.key_scales
        for name, tensor in (("weights", weights.value), ("queries", weights.observed), ("wanted", layer.next_positions)):
            if tensor is not None:
                held[f"{name} {index}"] = tensor
    for index, window in sequence.layers.items():
        if isinstance(window, WindowLayer):
            order = torch.arange(max(0, sequence.length - WINDOW), sequence.length) % WINDOW
            held[f"window {index}"] = window.ring[:, :, order]
    return held
