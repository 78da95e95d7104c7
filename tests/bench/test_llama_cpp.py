"""The llama.cpp benchmark: the file of a shape, a context without its prefill, timed steps."""

from __future__ import annotations

import struct
from importlib.util import find_spec

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from specache.bench import llama_cpp
from specache.bench.gguf_model import FORMATS, write_gguf
from specache.bench.llama_cpp import CACHE_TYPES, measure
from specache.bench.llama_state import SequenceState
from specache.bench.shapes import Shape
from specache.errors import BenchmarkError, ConfigError

SHAPE = Shape("tiny", 2, 64, 96, 4, 2, 32, 97, 10_000.0, False)
needs_llama = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


@pytest.mark.parametrize("weights", FORMATS)
def test_a_shape_becomes_a_file_with_its_dimensions_and_format(tmp_path, weights):
    path = tmp_path / "model.gguf"
    write_gguf(SHAPE, weights, path, seed=1)
    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert tensors["blk.1.attn_k.weight"].shape.tolist() == [64, 64]  # row length first
    assert tensors["blk.0.ffn_down.weight"].shape.tolist() == [96, 64]
    assert tensors["output.weight"].tensor_type == FORMATS[weights]
    values = dequantize(tensors["output.weight"].data, FORMATS[weights])
    assert values.shape == (97, 64) and 0.015 < values.std() < 0.025


def test_tied_embeddings_have_no_head_and_an_unknown_format_is_refused(tmp_path):
    write_gguf(Shape("tied", 1, 64, 96, 4, 2, 32, 97, 10_000.0, True), "bf16", tmp_path / "tied.gguf")
    assert "output.weight" not in {tensor.name for tensor in GGUFReader(tmp_path / "tied.gguf").tensors}
    with pytest.raises(ConfigError, match="got 'fp8'"):
        write_gguf(SHAPE, "fp8", tmp_path / "no.gguf")


def stored_state(tokens: int, stream: int, streams: int) -> bytes:
    """Return what llama.cpp stores of a sequence with two layers of rows of 3 and 5 bytes."""
    parts = [struct.pack("<III", 7, stream, streams)]
    for index in range(streams):
        if index != stream:
            parts.append(struct.pack("<I", 0))
            continue
        parts.append(struct.pack("<I", tokens))
        parts += [struct.pack("<III", position, 1, stream) for position in range(tokens)]
        parts.append(struct.pack("<II", 0, 2))
        for tensor, width in enumerate((3, 3, 5, 5)):
            rows = np.arange(tokens * width, dtype=np.uint8) + 100 * (tensor % 2)
            parts.append(struct.pack("<iQ", 8, width) + rows.tobytes())
    return b"".join(parts)


@pytest.mark.parametrize(("stream", "streams"), [(0, 1), (1, 3)])
def test_an_extended_state_repeats_the_rows(stream, streams):
    data = stored_state(4, stream, streams)
    state = SequenceState.parse(data)
    assert state.extended(4).tobytes() == data
    longer = SequenceState.parse(state.extended(10).tobytes())
    assert longer.cells["position"].tolist() == list(range(10))
    for (kind, rows), (_, short) in zip(longer.tensors, state.tensors, strict=True):
        assert kind == 8 and np.array_equal(rows, np.concatenate([short, short, short[:2]]))


@pytest.mark.parametrize("broken", [lambda d: d[:-1], lambda d: d + b"0", lambda d: d[:16] + b"\1" + d[17:]])
def test_a_state_of_another_layout_is_refused(broken):
    with pytest.raises(BenchmarkError, match="stored state"):
        SequenceState.parse(broken(stored_state(4, 0, 1)))


def test_llama_cpp_that_cannot_measure_says_why(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="q5_0"):
        measure(SHAPE, 8, 1, "bf16", "q5_0", 1, 1)
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match=r"specache\[bench\]"):
        measure(SHAPE, 8, 1, "bf16", "f16", 1, 1)
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: True)
    with pytest.raises(BenchmarkError, match=r"\.gguf files, and the shapes"):
        measure("Qwen/Qwen3-0.6B", 8, 1, "bf16", "f16", 1, 1)


def test_a_process_that_the_system_ends_is_an_error(monkeypatch, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: True)
    monkeypatch.setattr(llama_cpp.sys, "executable", "/bin/false")
    with pytest.raises(BenchmarkError, match="ended with code 1"):
        measure(path, 8, 1, "file", "f16", 1, 1)


@needs_llama
@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@pytest.mark.parametrize(("context", "batch"), [(20, 1), (600, 3)])
def test_steps_are_timed(cache_type, context, batch):
    samples = measure(SHAPE, context, batch, "q8_0", cache_type, 3, 1)
    assert len(samples) == 3 and min(samples) > 0


@needs_llama
def test_a_file_that_llama_cpp_cannot_load_is_an_error(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(BenchmarkError, match="cannot load"):
        measure(path, 8, 1, "file", "f16", 1, 1)
