"""A session belongs to what its keys and values mean, not to how its model is labelled, wrapped or
run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import specache
from specache.model.identity.code import code_digest
from specache.sessions.manifest_file import encode, read_manifest
from tests.model.identity import hook_changes as hooks
from tests.model.identity.two_turns import adapted
from tests.sessions.sequences import gemma, llama, opened, prefill, prompt, settings


@pytest.fixture(scope="module")
def of_a_hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with session `one` of Gemma 2, whose first layer slides."""
    root = tmp_path_factory.mktemp("hybrid")
    model = gemma()
    with opened(root, model, settings()) as session:
        prefill(session, model, prompt(200))
        session.save()
    return root


CHANGES = {"a_field_of_the_next_release": False, "attention_dropout": 0.1, "eos_token_id": 5, "id2label": {0: "x"}}


@pytest.mark.parametrize("name", CHANGES)
def test_a_session_opens_when_a_field_changed_that_keys_do_not_depend_on(root, name):
    later = llama()
    setattr(later.config, name, CHANGES[name])
    with opened(root, later) as session:
        assert session.saved_tokens == 300


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"rope_parameters": {"rope_theta": 5e5}}])
def test_a_session_is_refused_when_a_field_changed_that_keys_depend_on(root, change):
    with pytest.raises(specache.SessionError, match="another configuration"):
        opened(root, llama(**change))


def test_stored_rows_decide_about_a_field_that_one_release_added(tmp_path):
    """GPT-OSS had the limit of its activation as a number in its code, then as a field."""
    model = llama()
    with opened(tmp_path, model, settings()) as session:
        prefill(session, model, prompt(200))
        session.save()
    later = llama()
    later.config.swiglu_limit = 7.0
    with opened(tmp_path, later) as session:
        assert session.saved_tokens == 200
        session.save()
    opened(tmp_path, later).close()
    other = llama()
    other.config.swiglu_limit = None
    for layer in other.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(specache.SessionError, match="another configuration"):
        opened(tmp_path, other)
    later.config.attention_chunk_size = 600
    with pytest.raises(specache.SessionError, match="attention_chunk_size was None and is 600"):
        opened(tmp_path, later)


def test_a_session_is_refused_with_an_active_adapter_but_not_an_inactive_one(root):
    model = llama()
    layers = adapted(model, "a")
    with pytest.raises(specache.SessionError, match="made with no adapter, and this model runs with the adapter a"):
        opened(root, model)
    for layer in layers:
        layer.disable_adapters = True
    opened(root, model).close()


def test_adapters_of_the_same_name_differ_by_weights_and_scales(tmp_path):
    model = llama()
    layers = adapted(model, "a")
    with opened(tmp_path, model, settings()) as session:
        prefill(session, model, prompt(80))
        session.save()
    opened(tmp_path, model).close()
    layers[0].scaling["a"] = 1.0
    with pytest.raises(specache.SessionError, match="adapter a with other weights or scales"):
        opened(tmp_path, model)
    layers[0].scaling["a"] = 2.0
    with torch.no_grad():
        layers[0].lora_A["a"].weight.mul_(2)
    with pytest.raises(specache.SessionError, match="adapter a with other weights or scales"):
        opened(tmp_path, model)


def test_a_model_changed_while_its_session_is_open_is_refused(root):
    model = llama()
    with opened(root, model) as session:
        with torch.no_grad():
            model.lm_head.weight.data.mul_(2)
        with pytest.raises(specache.UsageError, match="model changed"):
            specache.generate(model, prompt(300), past_key_values=session.cache, max_new_tokens=2)


def test_an_empty_session_belongs_to_what_fills_it(tmp_path):
    model = llama()
    layers = adapted(model, "a", "b")
    with opened(tmp_path, model, settings()) as session:
        for layer in layers:
            layer.active_adapters = ["b"]
        prefill(session, model, prompt(80))
        for layer in layers:
            layer.active_adapters = ["a"]
        session.save()
    with pytest.raises(specache.SessionError, match="made with the adapter b, and this model runs with the adapter a"):
        opened(tmp_path, model)


def saved_with(root: Path, model: Any) -> None:
    with opened(root, model, settings()) as session:
        prefill(session, model, prompt(200))
        session.save()


def recording(model: Any, kept: list[Any]) -> None:
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: kept.append(output))


@pytest.mark.parametrize("change", hooks.CHANGES.values(), ids=hooks.CHANGES)
def test_a_session_is_refused_without_the_hooks_and_forwards_that_filled_it(tmp_path, change):
    """And with some that did not. What a model has again opens it."""
    steered = llama()
    change(steered)
    saved_with(tmp_path / "steered", steered)
    saved_with(tmp_path / "plain", llama())
    for root, model in ((tmp_path / "steered", llama()), (tmp_path / "plain", steered)):
        with pytest.raises(specache.SessionError, match="other hooks or replaced forwards"):
            opened(root, model)
    again = llama()
    change(again)
    for root, model in ((tmp_path / "steered", again), (tmp_path / "plain", llama())):
        with opened(root, model) as session:
            assert session.saved_tokens == 200


def test_a_hook_of_another_strength_is_another_hook(tmp_path):
    weak, strong = llama(), llama()
    hooks.steer(weak, 0.5)
    hooks.steer(strong, 1.5)
    saved_with(tmp_path, weak)
    with pytest.raises(specache.SessionError, match="other hooks"):
        opened(tmp_path, strong)


def test_a_vector_that_a_users_module_holds_belongs_to_the_session(tmp_path):
    class Steered(torch.nn.Module):
        def __init__(self, inner: Any, vector: torch.Tensor) -> None:
            super().__init__()
            self.inner, self.vector = inner, vector

        def forward(self, *args: Any, **more: Any) -> Any:
            return self.inner(*args, **more) + self.vector

    def steered(strength: float) -> Any:
        model = llama()
        model.model.layers[1] = Steered(model.model.layers[1], torch.full((64,), strength))
        return model

    saved_with(tmp_path, steered(0.5))
    with pytest.raises(specache.SessionError, match="other hooks"):
        opened(tmp_path, steered(1.5))
    with opened(tmp_path, steered(0.5)) as session:
        assert session.saved_tokens == 200


def test_hooks_that_change_no_rows_come_and_go_between_sessions(tmp_path):
    model, kept = llama(), []
    recording(model, kept)
    saved_with(tmp_path, model)
    for other in (llama(), llama()):
        with opened(tmp_path, other) as session:
            assert session.saved_tokens == 200
            session.save()
        recording(other, kept)


def test_hooks_that_came_after_a_session_was_opened_fill_it(tmp_path):
    model = llama()
    with opened(tmp_path, model, settings()) as session:
        hooks.steer(model, 0.5)
        prefill(session, model, prompt(80))
        session.save()
    with pytest.raises(specache.SessionError, match="other hooks"):
        opened(tmp_path, llama())
    with opened(tmp_path, model) as session:
        assert session.saved_tokens == 80


def test_a_session_from_before_hooks_were_noted_is_judged_by_its_rows(tmp_path):
    steered = llama()
    hooks.steer(steered, 0.5)
    saved_with(tmp_path, steered)
    path = tmp_path / "one" / "session.json"
    document = json.loads(path.read_text())
    del document["body"]["identity"]["code"]
    document["digest"] = hashlib.blake2b(json.dumps(document["body"], sort_keys=True).encode(), digest_size=32).hexdigest()
    path.write_text(json.dumps(document))
    with opened(tmp_path, steered) as session:
        assert session.saved_tokens == 200


def test_the_digest_of_hooks_is_the_same_in_another_process():
    """There the elements of a set have another order."""
    model = llama()
    for change in hooks.CHANGES.values():
        change(model)
    lines = (
        "from tests.model.identity import hook_changes as hooks",
        "from specache.model.identity.code import code_digest",
        "from tests.tiny import llama",
        "model = llama()",
        "[change(model) for change in hooks.CHANGES.values()]",
        "print(code_digest(model))",
    )
    program, root = [sys.executable, "-c", "; ".join(lines)], Path(__file__).parents[2]
    other = subprocess.run(program, cwd=root, check=True, capture_output=True, text=True).stdout
    assert other.strip() == code_digest(model) != ""


# Sessions of the first version: digests of the whole configuration, and of 1,024 elements per
# tensor


def first_form(root: Path, model: Any, name: str = "one") -> None:
    """Rewrite a session's manifest as the first version wrote it."""
    no_matter = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict"}
    no_matter |= {"output_attentions", "output_hidden_states", "_attn_implementation", "attn_implementation"}
    no_matter |= {"_attn_implementation_autoset"}

    def relevant(value: Any) -> Any:
        return {k: relevant(v) for k, v in value.items() if k not in no_matter} if isinstance(value, dict) else value

    weights = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        weights.update(f"{key}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        index = torch.linspace(0, tensor.numel() - 1, min(tensor.numel(), 1024), dtype=torch.float64).long()
        weights.update(tensor.take(index).view(torch.uint8).numpy().tobytes())
    config = json.dumps(relevant(model.config.to_dict()), sort_keys=True, default=str)
    manifest = read_manifest(root / name)
    assert manifest is not None
    identity = dataclasses.replace(
        manifest.identity, config=hashlib.sha256(config.encode()).hexdigest(), weights=weights.hexdigest(), adapters=None
    )
    document = json.loads(encode(dataclasses.replace(manifest, identity=identity)))
    del document["body"]["identity"]["adapters"]
    document["digest"] = hashlib.blake2b(json.dumps(document["body"], sort_keys=True).encode(), digest_size=32).hexdigest()
    (root / name / "session.json").write_text(json.dumps(document))


def test_a_first_version_session_opens_and_is_saved_in_the_present_version(root):
    first_form(root, llama())
    with opened(root, torch.compile(llama(), backend="eager")) as session:
        assert session.saved_tokens == 300
        session.save()
    manifest = read_manifest(root / "one")
    assert manifest is not None and manifest.identity.config.startswith("2:") and manifest.identity.adapters == ""
    opened(root, llama()).close()


def test_a_first_version_session_is_refused_for_other_weights(root):
    first_form(root, llama())
    with pytest.raises(specache.SessionError, match="other weights"):
        opened(root, llama(seed=1))


def test_a_first_version_session_opens_after_an_upgrade_that_adds_a_field(root):
    first_form(root, llama())
    later = llama()
    later.config.a_field_of_the_next_release = False
    with opened(root, later) as session:
        assert session.saved_tokens == 300


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-2}, {"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}]
)
def test_a_first_version_session_is_refused_if_its_rows_differ(root, change):
    first_form(root, llama())
    with pytest.raises(specache.SessionError, match="another configuration"):
        opened(root, llama(**change))


def test_a_first_version_session_of_a_hybrid_model_opens_after_an_upgrade(of_a_hybrid):
    first_form(of_a_hybrid, gemma())
    later = gemma()
    later.config.a_field_of_the_next_release = False
    with opened(of_a_hybrid, later) as session:
        assert session.saved_tokens == 200
