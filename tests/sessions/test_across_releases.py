"""A session made under one release of transformers continues under another, and back.

`make test-oldest` names the other environment's interpreter in `SPECACHE_OTHER_PYTHON`; without one
there is nothing to test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import specache
from specache import SpeCacheConfig
from tests.cli.tiny_chat import byte_tokenizer
from tests.engine.test_model_families import FAMILIES, build
from tests.sessions.sequences import gemma, llama, opened, prompt

OTHER = os.environ.get("SPECACHE_OTHER_PYTHON")
TURN = 90
SETTINGS = {"group_size": 16, "residual": 16, "top_k": 8, "prefill_chunk": 64}
MODELS = {
    "llama": (llama, "verified"),
    "gemma": (gemma, "on-demand"),
    "phi": (lambda: build("Phi", {"partial_rotary_factor": 0.5, "vocab_size": 300}), "on-demand"),  # 5.17 writes the factor twice
    "gpt-oss": (lambda: build(FAMILIES["gpt-oss"][0], {**FAMILIES["gpt-oss"][1], "vocab_size": 300}), "on-demand"),  # swiglu_limit
}


def take_turn(root: Path, folder: Path, policy: str, turn: int) -> dict[str, Any]:
    """Continue the session by one turn, save it, and return its state and the tokens reused."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with opened(root, model, SpeCacheConfig(policy=policy, **SETTINGS), tokenizer=tokenizer) as session:
        held = session.token_ids
        said = torch.tensor([held + prompt(TURN, seed=turn)[0].tolist()])
        specache.generate(model, said, past_key_values=session.cache, max_new_tokens=12, do_sample=False)
        session.save()
        return {"held": len(held), "tokens": session.token_ids, "release": transformers.__version__}


def there(*arguments: Any) -> dict[str, Any]:
    """Run `take_turn` in the other environment."""
    command = [str(OTHER), str(Path(__file__)), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(OTHER is None, reason="no other environment (SPECACHE_OTHER_PYTHON)")
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("first", ["here", "there"])
def test_a_session_continues_under_another_transformers_release_and_back(tmp_path, family, first):
    make, policy = MODELS[family]
    model = make()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    order = [take_turn, there, take_turn] if first == "here" else [there, take_turn, there]
    held = 0
    for turn, run in enumerate(order):
        crossed = run(tmp_path / "crossing", tmp_path / "model", policy, turn)
        stayed = take_turn(tmp_path / "staying", tmp_path / "model", policy, turn)
        assert crossed["held"] == stayed["held"] == held and crossed["tokens"] == stayed["tokens"]
        held = len(stayed["tokens"])
        if run is there:
            assert crossed["release"] != stayed["release"]


if __name__ == "__main__":
    root, folder, policy, turn = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(take_turn(Path(root), Path(folder), policy, int(turn))))
