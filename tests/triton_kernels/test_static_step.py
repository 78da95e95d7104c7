"""A decode over static buffers on the Triton kernels equals the reference."""

from __future__ import annotations

from specache import reference
from specache.kernels import dispatch
from tests.device.running import static_steps
from tests.test_invariants import run, settings
from tests.tiny import llama, prompt

NEW = 4


def test_a_decode_over_static_buffers_equals_the_reference(monkeypatch):
    """A group retires on the way. Launches are no operations of PyTorch, all that a simulated graph records: so there is none."""
    model = llama(num_hidden_layers=1)
    config = settings(code="rotated", bits=2, residual=7, policy="verified", slow_tier="ram", prefill_chunk=4096)
    with dispatch.using("triton"), static_steps(monkeypatch, capacity_step=64) as steps:
        tokens, logits, _ = run(model, prompt(53), config, new=NEW)
    assert steps == [1] * (NEW - 1)
    expected = reference.generate(model, prompt(53), config, NEW, forced_tokens=tokens)
    assert (logits - expected.logits).abs().max() < 1e-3
