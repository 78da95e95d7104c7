"""Write a shape as a GGUF file with seeded random weights, for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from specache.bench.shapes import POSITIONS, Shape
from specache.errors import ConfigError

FORMATS = {
    "fp32": GGMLQuantizationType.F32,
    "fp16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "int8": GGMLQuantizationType.Q8_0,
    "int4": GGMLQuantizationType.Q4_0,
    "f16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
    "q4_1": GGMLQuantizationType.Q4_1,
}
"""Names of `--weights` and of llama.cpp -> what llama.cpp computes with."""
DRAWN_VALUES = 1 << 22  # random values per row length; larger matrices repeat them
STANDARD_DEVIATION = 0.02


def write_gguf(shape: Shape, weights: str, path: Path, seed: int = 0) -> None:
    """Write a Llama of this shape to `path`. It has no tokenizer: token ids go in, logits come out.

    Args:
        weights: a key of `FORMATS`. Norms are float32 in all of them.

    Raises:
        ConfigError: llama.cpp has no such format.
    """
    if weights not in FORMATS:
        raise ConfigError(f"llama.cpp's weights can be {', '.join(FORMATS)}, got {weights!r}.")
    writer = GGUFWriter(path, "llama")
    try:
        _describe(writer, shape)
        matrices = _Matrices(FORMATS[weights], seed)
        tensors = list(_tensors(shape))
        for name, dims in tensors:
            data, kind = matrices.block(dims)
            row_bytes = (dims[0], data.shape[1]) if len(dims) == 2 else dims
            nbytes = dims[0] * data[0].nbytes
            writer.add_tensor_info(name, row_bytes, data.dtype, nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, dims in tensors:
            data, _ = matrices.block(dims)
            writer.write_tensor_data(data[np.arange(dims[0]) % len(data)])
    finally:
        writer.close()


class _Matrices:
    """Random matrices in one format. Matrices of one row length share their values."""

    def __init__(self, kind: GGMLQuantizationType, seed: int) -> None:
        self._kind = kind
        self._random = np.random.default_rng(seed)
        self._blocks: dict[int, Any] = {}

    def block(self, dims: tuple[int, ...]) -> tuple[Any, GGMLQuantizationType]:
        """Return rows to repeat until there are `dims[0]`, and their format. Vectors are ones."""
        if len(dims) == 1:
            return np.ones(dims, dtype=np.float32), GGMLQuantizationType.F32
        width = dims[1]
        if width not in self._blocks:
            drawn = self._random.standard_normal((max(1, DRAWN_VALUES // width), width), dtype=np.float32)
            self._blocks[width] = quantize(drawn * STANDARD_DEVIATION, self._kind)
        return self._blocks[width], self._kind


def _describe(writer: Any, shape: Shape) -> None:
    writer.add_name(shape.name)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.query_heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("none")


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and dimensions [rows, row length] as llama.cpp expects them.

    Tied embeddings have no `output.weight`.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd.weight", (shape.vocabulary, hidden)
    for layer in range(shape.layers):
        yield f"blk.{layer}.attn_norm.weight", (hidden,)
        yield f"blk.{layer}.attn_q.weight", (queries, hidden)
        yield f"blk.{layer}.attn_k.weight", (keys, hidden)
        yield f"blk.{layer}.attn_v.weight", (keys, hidden)
        yield f"blk.{layer}.attn_output.weight", (hidden, queries)
        yield f"blk.{layer}.ffn_norm.weight", (hidden,)
        yield f"blk.{layer}.ffn_gate.weight", (inner, hidden)
        yield f"blk.{layer}.ffn_up.weight", (inner, hidden)
        yield f"blk.{layer}.ffn_down.weight", (hidden, inner)
    yield "output_norm.weight", (hidden,)
    if not shape.tied_embeddings:
        yield "output.weight", (shape.vocabulary, hidden)
