"""A GGUF file in another number format: the same model, up to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from specache.bench.gguf_model import write_gguf
from specache.bench.gguf_weights import rewrite_gguf
from specache.cli.models import demo_gguf
from specache.errors import BenchmarkError, ConfigError
from tests.bench.tiny_shape import TINY


def values(reader: GGUFReader) -> dict[str, np.ndarray]:
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def metadata(reader: GGUFReader) -> dict[str, object]:
    """Return every value; of a long list its length and last elements."""
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return {
        name: (len(one.data), one.contents(slice(-9, None) if len(one.data) > 9 else slice(None))) for name, one in fields.items()
    }


@pytest.mark.parametrize(("weights", "tolerance"), [("fp32", 0.0), ("bf16", 2**-8), ("int8", 2**-6)])
def test_values_and_metadata_stay(tmp_path: Path, weights: str, tolerance: float):
    write_gguf(TINY, "q8_0", tmp_path / "a.gguf")
    rewrite_gguf(tmp_path / "a.gguf", weights, tmp_path / "b.gguf")
    old, new = GGUFReader(tmp_path / "a.gguf"), GGUFReader(tmp_path / "b.gguf")
    before, after = values(old), values(new)
    assert before.keys() == after.keys()
    for name, expected in before.items():
        assert np.abs(after[name] - expected).max() <= tolerance * np.abs(expected).max()
    assert metadata(old) == metadata(new)


def test_a_tokenizer_is_copied(tmp_path: Path):
    source = demo_gguf()
    if source is None:
        pytest.skip("the demo model is not installed")
    rewrite_gguf(source, "bf16", tmp_path / "b.gguf")
    new = GGUFReader(tmp_path / "b.gguf")
    before, after = metadata(GGUFReader(source)), metadata(new)
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed <= {"general.file_type", "general.quantization_version"} and "tokenizer.ggml.tokens" in after
    kinds = {tensor.tensor_type for tensor in new.tensors}
    assert kinds == {GGMLQuantizationType.BF16, GGMLQuantizationType.F32}


def test_what_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(BenchmarkError, match=r"cannot write torn\.gguf"):
        rewrite_gguf(tmp_path / "torn.gguf", "bf16", tmp_path / "b.gguf")
    with pytest.raises(ConfigError, match="got 'int3'"):
        rewrite_gguf(tmp_path / "torn.gguf", "int3", tmp_path / "b.gguf")
