"""Models by shape: published dimensions with seeded random weights, to measure time and memory.

Symbols: `L` layers, `Hq` query heads, `Hkv` key-value heads, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from specache.bench.compute_device import CPU
from specache.errors import BenchmarkError, ConfigError
from specache.linear.weight_quant import WeightFormat, quantise_weights

POSITIONS = 1 << 20  # more than any synthetic context; RoPE needs no table


class Weights(StrEnum):
    """Number format of a model's weights."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations, cache and unquantised weights."""
        return {Weights.FP32: torch.float32, Weights.FP16: torch.float16}.get(self, torch.bfloat16)

    @property
    def quantised(self) -> WeightFormat:
        """Return the format of the linear layers' weights, or `auto` if they are not quantised."""
        return WeightFormat(self.value) if self in (Weights.INT8, Weights.INT4) else WeightFormat.AUTO


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama-like model."""

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rope_theta: float
    tied_embeddings: bool

    def config(self) -> LlamaConfig:
        """Return transformers' configuration of this shape, without an end token."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=self.tied_embeddings,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, 100_000.0, True),
        Shape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, 500_000.0, True),
        Shape("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128, 128256, 500_000.0, True),
        Shape("llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256, 500_000.0, False),
    )
}


def shape_named(name: str) -> Shape:
    """Return the shape of `SHAPES` with this name.

    Raises:
        ConfigError: no shape has this name.
    """
    if name not in SHAPES:
        raise ConfigError(f"--shape must be one of {', '.join(SHAPES)}, got {name!r}.")
    return SHAPES[name]


class ModelSource(Protocol):
    """Where a benchmark's model comes from.

    It is sent to other processes, so it holds no weights before `load`.
    """

    @property
    def name(self) -> str:
        """Return the model's name as the user wrote it."""

    @property
    def weights(self) -> Weights: ...

    @property
    def shape(self) -> Shape | None:
        """Return the shape of a model with random weights, or `None` for a real one."""

    @property
    def gguf(self) -> str | None:
        """Return the .gguf file of a real model, if it has one. llama.cpp can read it."""

    def load(self) -> Any:
        """Load the transformers model."""

    def pretrained(self) -> str:
        """Return the folder or hub name from which `from_pretrained` loads model and tokenizer.

        Raises:
            ConfigError: a model of random weights has neither.
        """

    def prompt(self, tokens: int, text: Path | None, seed: int) -> list[int]:
        """Return a prompt of `tokens` token ids. Call it after `load`.

        A real model's prompt is the beginning of a text: of the file `text`, or of Python's own
        documentation.

        Raises:
            ConfigError: the text is too short, or a model of random weights is given one.
        """


@dataclass(frozen=True)
class RandomModel:
    """A model of a shape with seeded random weights, made on `device` (`cpu` or `cuda`)."""

    shape: Shape
    weights: Weights
    seed: int = 0
    device: str = CPU

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def gguf(self) -> str | None:
        return None

    def load(self) -> Any:
        """Make the model. Raise `BenchmarkError` if the weights do not fit the GPU's memory."""
        torch.manual_seed(self.seed)
        try:
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(self.shape.config(), dtype=self.weights.dtype).eval()
        except torch.OutOfMemoryError as error:
            message = f"the GPU has no room for the weights of {self.name}. Use --device cpu, or a smaller shape."
            raise BenchmarkError(message) from error
        if self.weights.quantised is not WeightFormat.AUTO:
            quantise_weights(model, self.weights.quantised)
        return model

    def pretrained(self) -> str:
        raise ConfigError(f"{self.name} is a shape without a tokenizer, and a server takes text. Name a model with --model.")

    def prompt(self, tokens: int, text: Path | None, seed: int) -> list[int]:
        """Return seeded random token ids."""
        if text is not None:
            raise ConfigError("--text is for a real model: random weights make nothing of it. Leave it out, or name a --model.")
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = torch.randint(0, self.shape.vocabulary, (tokens,), generator=generator).tolist()
        return ids
