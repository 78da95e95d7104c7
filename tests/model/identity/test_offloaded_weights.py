"""Weights that accelerate keeps in main memory or on disk: the model runs, and is identified by
them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

import specache
from specache.model.dimensions import dimensions_of
from specache.model.identity import offloaded_weights as offloaded
from specache.sessions.identity import identify
from tests.model.identity.two_turns import NEW, first_turn, second_turn, settings
from tests.tiny import llama, prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved model."""
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    return path


def loaded(folder: Path, offload: Path, embedding: str = "disk") -> Any:
    """Return a model with its layers on disk, in the files that they are loaded from."""
    places = {"model.embed_tokens": embedding, "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" for i in range(3)}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=offload).eval()


def in_files_of_accelerate(folder: Path, offload: Path) -> Any:
    model = llama()
    disk_offload(model, offload, execution_device=torch.device("cpu"))
    return model


def in_main_memory(folder: Path, offload: Path) -> Any:
    model = llama()
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


KINDS = {"in safetensors": loaded, "in accelerate's files": in_files_of_accelerate, "in main memory": in_main_memory}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@kinds
def test_an_offloaded_model_answers_and_continues(make, folder, tmp_path):
    model = make(folder, tmp_path)
    cache, said = first_turn(model)
    assert cache.info.device.type == "cpu" and cache.info.dtype is torch.float32
    assert torch.equal(said, llama().generate(prompt(70), **NEW))
    assert second_turn(model, cache, said)


@kinds
def test_an_offloaded_model_has_the_identity_of_the_loaded_weights(make, folder, tmp_path):
    assert identify(make(folder, tmp_path)) == identify(llama())
    assert dimensions_of(make(folder, tmp_path)).layers == dimensions_of(llama()).layers


def test_a_session_opens_again_and_not_for_other_weights(folder, tmp_path):
    root, other = tmp_path / "sessions", tmp_path / "other"
    llama(seed=1).save_pretrained(other)
    for model in (loaded(folder, tmp_path / "a"), llama(), loaded(folder, tmp_path / "b", embedding="cpu")):
        with specache.Session("s", model, settings(slow_tier="auto"), folder=root) as session:
            specache.generate(model, prompt(70), past_key_values=session.cache, **NEW)
            session.save()
    with pytest.raises(specache.SessionError, match="other weights"):
        specache.Session("s", loaded(other, tmp_path / "c"), folder=root)


def test_identification_does_not_read_whole_files(tmp_path, monkeypatch):
    big = llama(hidden_size=256, intermediate_size=1024)
    expected = identify(big)
    disk_offload(big, tmp_path, execution_device=torch.device("cpu"))
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(offloaded.os, "pread", lambda fd, size, at: read.append(size) or pread(fd, size, at))
    assert identify(big) == expected
    assert 0 < sum(read) < 0.1 * sum(file.stat().st_size for file in tmp_path.glob("*.dat"))


def test_a_modified_file_of_weights_is_detected(tmp_path):
    model = in_files_of_accelerate(tmp_path, tmp_path)
    cache, said = first_turn(model)
    file = tmp_path / "model.layers.1.mlp.down_proj.weight.dat"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    with pytest.raises(specache.UsageError, match=r"layers\.1\.mlp\.down_proj\.weight has other values"):
        second_turn(model, cache, said)


def test_float32_files_loaded_in_16_bits_have_the_identity_of_the_loaded_weights(folder, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers": "disk"}
    options = {"device_map": places, "offload_folder": tmp_path, "dtype": torch.bfloat16}
    assert identify(AutoModelForCausalLM.from_pretrained(folder, **options)) == identify(llama().bfloat16())


def test_a_missing_file_of_weights_is_named(tmp_path):
    model = in_files_of_accelerate(tmp_path, tmp_path)
    cache, said = first_turn(model)
    (tmp_path / "model.layers.1.mlp.down_proj.weight.dat").unlink()
    with pytest.raises(specache.UsageError, match=r"down_proj\.weight\.dat, which cannot be read"):
        second_turn(model, cache, said)
