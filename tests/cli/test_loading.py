"""A model that was not loaded completely, or whose files are damaged, does not answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specache.cli.loading import IncompleteModelError
from specache.cli.model_files import fault
from specache.cli.models import Dtype, ModelNotFoundError, load

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


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", '{"eos_token_id": 1,', "was cut off"),
        ("generation_config.json", "", "was cut off"),
        ("generation_config.json", "[]", "a JSON list instead of an object"),
        ("generation_config.json", '{"eos_token_id": "<end>"}', 'has "<end>" as eos_token_id, which must be a token id'),
        ("generation_config.json", '{"pad_token_id": [0]}', "as pad_token_id"),
        ("generation_config.json", '{"stop_strings": [5]}', "as stop_strings, which must be a text or a list of texts"),
        ("generation_config.json", '{"bad_words_ids": [1]}', "as bad_words_ids"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "as model_max_length, which must be a number"),
        ("tokenizer_config.json", "{", "was cut off"),
        ("tokenizer.json", "{", "was cut off"),
        ("config.json", "[]", "a JSON list instead of an object"),
        ("chat_template.jinja", "", "is empty"),
        ("chat_template.jinja", "\udcff", "was cut off"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_refused_by_name(folder, file, content, message):
    (folder / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelNotFoundError) as error:
        loaded(folder)
    assert str(folder / file) in str(error.value) and message in str(error.value)


def test_settings_that_many_files_have_are_no_damage(folder):
    settings = {"eos_token_id": [1, 2], "pad_token_id": None, "stop_strings": "x", "max_length": 20, "of_a_later_release": [[]]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert loaded(folder)
    (folder / "generation_config.json").unlink()
    assert loaded(folder)


def test_a_damaged_file_of_a_hub_model_is_found_in_the_local_cache(folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = repository / "snapshots" / commit / "generation_config.json"
    assert fault("owner/name", None, loaded=True) is None and fault("owner/name", commit, loaded=False) is None
    found.write_text("{")
    assert str(found) in (fault("owner/name", None, loaded=True) or "")
