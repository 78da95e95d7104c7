"""A whole decode on the Triton kernels equals the reference."""

from __future__ import annotations

import pytest

from specache import reference
from specache.kernels import dispatch
from tests.cache.test_invariants import run, settings
from tests.tiny import llama, prompt

NEW = 4


@pytest.mark.parametrize("code", ["kivi", "rotated"])
def test_a_decode_equals_the_reference(code):
    model = llama(num_hidden_layers=2)
    config = settings(code=code, bits=2, residual=7, policy="verified", slow_tier="ram", prefill_chunk=4096)
    with dispatch.using("triton"):
        tokens, logits, _ = run(model, prompt(80), config, new=NEW)
    expected = reference.generate(model, prompt(80), config, NEW, forced_tokens=tokens)
    assert (logits - expected.logits).abs().max() < 1e-3
