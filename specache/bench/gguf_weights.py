"""Write a GGUF file again with its weights in another number format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import Keys
from gguf.quants import QuantError, dequantize, quantize

from specache.bench.gguf_model import FORMATS
from specache.errors import BenchmarkError, ConfigError

_OWN_KEYS = (Keys.General.ARCHITECTURE, Keys.General.ALIGNMENT, Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION)


def rewrite_gguf(source: Path, weights: str, target: Path) -> None:
    """Write `source` to `target` with matrices in `weights`, and everything else as it is.

    Metadata and tokenizer are copied. Vectors (norms, biases) stay as they are. A matrix whose rows
    are no multiple of the format's block is float16.

    Args:
        weights: a key of `gguf_model.FORMATS`.

    Raises:
        ConfigError: there is no such format.
        BenchmarkError: the file cannot be read or written.
    """
    if weights not in FORMATS:
        raise ConfigError(f"llama.cpp's weights can be {', '.join(FORMATS)}, got {weights!r}.")
    try:
        reader = GGUFReader(source)
        writer = GGUFWriter(target, reader.fields[Keys.General.ARCHITECTURE].contents())
        try:
            _copy_metadata(reader, writer)
            for tensor in reader.tensors:
                data, kind = _converted(tensor, FORMATS[weights])
                writer.add_tensor(tensor.name, data, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    except (OSError, ValueError, KeyError, NotImplementedError, QuantError) as error:
        raise BenchmarkError(f"cannot write {source.name} with {weights} weights for llama.cpp: {error}.") from error


def _copy_metadata(reader: GGUFReader, writer: Any) -> None:
    for name, field in reader.fields.items():
        if name in _OWN_KEYS or name.startswith("GGUF."):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=element)


def _converted(tensor: Any, kind: GGMLQuantizationType) -> tuple[Any, GGMLQuantizationType]:
    """Return a tensor's data and its format in the new file."""
    if len(tensor.shape) < 2:
        return tensor.data, tensor.tensor_type
    values = dequantize(tensor.data, tensor.tensor_type)
    try:
        return quantize(values, kind), kind
    except QuantError:  # a row is not made of whole blocks
        return quantize(values, GGMLQuantizationType.F16), GGMLQuantizationType.F16
