"""A GGUF file in another number format: the same model, up to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize

from specache.bench.gguf_model import write_gguf
from specache.bench.gguf_weights import rewrite_gguf
from specache.errors import BenchmarkError, ConfigError
from tests.bench.tiny_shape import TINY


def values(reader: GGUFReader) -> dict[str, np.ndarray]:
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def metadata(reader: GGUFReader) -> dict[str, object]:
    return {name: one.contents() for name, one in reader.fields.items() if not name.startswith("GGUF.")}


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
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<end>", "Ġtree", "ä"])
    writer.add_token_types([3, 1, 1])
    writer.add_token_scores([0.0, -1.5, 2.0])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.add_tensor("narrow.weight", np.ones((4, 5), dtype=np.float32))  # no row of whole blocks
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rewrite_gguf(tmp_path / "a.gguf", "int8", tmp_path / "b.gguf")
    new = GGUFReader(tmp_path / "b.gguf")
    assert metadata(new) == metadata(GGUFReader(tmp_path / "a.gguf")) and len(metadata(new)) == 8
    assert [tensor.tensor_type for tensor in new.tensors] == [GGMLQuantizationType.F16]


def test_what_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(BenchmarkError, match=r"cannot write torn\.gguf"):
        rewrite_gguf(tmp_path / "torn.gguf", "bf16", tmp_path / "b.gguf")
    with pytest.raises(ConfigError, match="got 'int3'"):
        rewrite_gguf(tmp_path / "torn.gguf", "int3", tmp_path / "b.gguf")
