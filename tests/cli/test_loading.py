"""A model that was not loaded completely does not answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specache.cli.loading import IncompleteModelError
from specache.cli.models import Dtype, load

LAYER = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a saved model."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def loaded(folder: Path) -> list[str]:
    notes: list[str] = []
    load(str(folder), dtype=Dtype.FLOAT32, on_progress=notes.append)
    return notes


def test_a_complete_model_loads_without_a_note(folder):
    assert not any("Not used" in note for note in loaded(folder))


def test_missing_weights_are_refused_by_name(folder):
    rewrite(folder, lambda tensors: tensors.pop(LAYER))
    with pytest.raises(IncompleteModelError, match=LAYER):
        loaded(folder)


def test_a_layer_that_the_files_lack_is_refused(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": settings["num_hidden_layers"] + 1}))
    with pytest.raises(IncompleteModelError, match=r"layers\.3"):
        loaded(folder)


def test_a_layer_that_the_configuration_lacks_is_refused(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": settings["num_hidden_layers"] - 1}))
    with pytest.raises(IncompleteModelError, match=r"layers\.2.*number of layers"):
        loaded(folder)


def test_a_bias_that_the_model_would_leave_out_is_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({LAYER.replace("weight", "bias"): torch.ones(64)}))
    with pytest.raises(IncompleteModelError, match=r"q_proj\.bias"):
        loaded(folder)


def test_scales_of_a_quantisation_that_the_configuration_does_not_name_are_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({LAYER.replace("weight", "weight_scale"): torch.ones(1)}))
    with pytest.raises(IncompleteModelError, match="weight_scale"):
        loaded(folder)


def test_tensors_of_another_shape_are_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({LAYER: torch.ones(32, 64)}))
    with pytest.raises(IncompleteModelError, match=r"q_proj.*\[32, 64\] in the files"):
        loaded(folder)


def test_tensors_of_another_component_are_ignored_with_a_note(folder):
    extra = {"vision_tower.embeddings.weight": torch.ones(2), "v_head.summary.weight": torch.ones(2)}
    rewrite(folder, lambda tensors: tensors.update(extra))
    assert any("Not used" in note and "vision_tower.embeddings.weight" in note for note in loaded(folder))


def test_buffers_of_old_releases_are_ignored_without_a_note(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert not any("Not used" in note for note in loaded(folder))
