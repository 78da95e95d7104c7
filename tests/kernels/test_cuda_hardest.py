"""The Triton kernels on a GPU at the variants that are hardest for them, and whole decodes of every
kind of layer against the reference. Needs an NVIDIA GPU.

Everything here takes a device, so that it can be tried in Triton's interpreter too.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import specache
from specache import reference
from specache.config import Code, ReadPath
from specache.device.device_hot_set import DeviceHotSet
from specache.device.device_rows import DeviceRowFetcher, RowCounters, StepBuffers
from specache.device.fused_rows import FusedRowFetcher
from specache.device.sources import MappedRows, StoredRows
from specache.tiers.streams import InlineStreams, streams_for
from tests.engine.test_model_families import FAMILIES, build
from tests.kernels.test_native import Case
from tests.kernels.test_triton import check_against_pytorch
from tests.tiny import FETCHING, prompt

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EIGHT = [1, 0, 7, 9, 40, 63, 129, 2]  # groups of each sequence: below, at and past pages, splits of 512 and blocks of 4,096


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("code", "bits", "group", "dim", "heads", "groups", "queries"),
    [
        (Code.ROTATED, 2, 64, 128, 2, 4, 2),  # Llama-3-8B's heads under `verified`
        (Code.ROTATED, 1, 32, 64, 2, 4, 1),
        (Code.KIVI, 1, 64, 256, 1, 8, 2),  # sixteen queries over the widest heads
        (Code.KIVI, 2, 16, 80, 2, 7, 1),  # Phi's heads: no power of two; Qwen's seven queries per head
        (Code.KIVI, 2, 64, 96, 1, 9, 2),  # eighteen queries: a second block of them
        (Code.ROTATED, 4, 16, 20, 3, 1, 2),  # a row of codes that is no whole word
    ],
)
def test_a_ragged_batch_of_eight_equals_pytorchs(code, bits, group, dim, heads, groups, queries, dtype):
    case = Case(code, bits, group, dim, heads, groups, queries, [count * 64 // group for count in EIGHT], 3, dtype)
    check_against_pytorch(case, dtype, CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_long_sequence_beside_a_short_one_equals_pytorchs(dtype):
    """40,960 tokens: eighty splits, ten blocks of the selection, and a table for as many pages."""
    check_against_pytorch(Case(Code.ROTATED, 2, 64, 64, 1, 4, 2, [640, 3], 5, dtype), dtype, CUDA)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("counts", "heads", "groups", "rows", "dim", "softcap", "has_sinks"),
    [
        ((0, 1, 31, 32, 33, 63, 64, 69), 2, 4, 2, 128, None, False),
        ((69, 5), 2, 9, 2, 256, 3.0, True),
        ((12, 68), 1, 1, 1, 64, None, True),
        ((40, 17), 2, 7, 2, 80, 30.0, False),
        ((3,), 1, 2, 2, 20, None, False),
    ],
)
def test_attention_outside_the_copy_equals_pytorchs(counts, heads, groups, rows, dim, softcap, has_sinks, dtype):
    from tests.kernels.recent_case import check_recent

    check_recent(CUDA, counts, heads, groups, rows, dim, dtype, softcap, has_sinks, seed=4)


@pytest.mark.parametrize("read", list(ReadPath))
@pytest.mark.parametrize(("k", "slots", "tokens"), [(64, 64, 900), (64, 2100, 9000), (1100, 1200, 3000)])
def test_hot_sets_equal_pytorchs_number_for_number(k, slots, tokens, read):
    check_hot_sets(CUDA, k, slots, tokens, read)


def check_hot_sets(device: torch.device, k: int, slots: int, tokens: int, read: ReadPath, steps: int = 12) -> None:
    """The same steps on a device and in PyTorch on the CPU: rows, hits, victims and counts."""
    batch, heads, width = 3, 2, 64
    generator = torch.Generator().manual_seed(0)
    stored = [torch.randn(heads, tokens, width, generator=generator).to(torch.bfloat16) for _ in range(batch)]
    pinned = [rows.pin_memory() if device.type == "cuda" else rows for rows in stored]
    plain = _fetcher(DeviceRowFetcher, StoredRows(stored), CPU, k, slots, tokens, width, read)
    fused = _fetcher(FusedRowFetcher, MappedRows(pinned, device), device, k, slots, tokens, width, read)
    for step in range(steps):
        wanted = [_selection(batch, heads, k, tokens, 3 * step + i) for i in range(3)]
        for fetcher, where in ((plain, CPU), (fused, device)):
            here = [one.to(where) for one in wanted]
            fetcher.begin_step()
            fetcher.fetch(here[0])
            fetcher.available(here[1])
            fetcher.submit(here[2])
            fetcher.join()
        for name in ("kv_rows", "positions"):
            assert torch.equal(getattr(fused._buffers, name).cpu(), getattr(plain._buffers, name)), (step, name)
        assert torch.equal(fused.hot.owner[..., :slots].cpu(), plain.hot.owner[..., :slots]), step
        assert torch.equal(fused.hot.kv_rows[:, :, :slots].cpu(), plain.hot.kv_rows[:, :, :slots]), step
    assert fused._counters.totals.tolist() == plain._counters.totals.tolist()


def _fetcher(cls: Any, source: Any, device: torch.device, k: int, slots: int, tokens: int, width: int, read: ReadPath) -> Any:
    hot = DeviceHotSet(3, 2, slots, tokens, width, torch.bfloat16, device)
    streams = streams_for(device) if device.type == "cuda" else InlineStreams()
    return cls(source, hot, StepBuffers(3, 2, k, width, torch.bfloat16, device), streams, RowCounters(device, 2 * width), read)


def _selection(batch: int, heads: int, k: int, tokens: int, seed: int) -> torch.Tensor:
    """Ascending positions [B, Hkv, k] that drift, some without a pair."""
    generator = torch.Generator().manual_seed(seed)
    near = min(tokens, 2 * k)
    found = torch.rand(batch, heads, near, generator=generator).argsort(-1)[..., :k]
    found = ((found + 17 * seed) % tokens).sort(-1).values
    found[0, 0, k - k // 4 :] = -1
    return found


@pytest.mark.parametrize("policy", [*FETCHING, "none"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-oss", "qwen2"])
def test_a_decode_equals_the_reference(family, policy):
    """Full and sliding layers, soft caps, sinks and biases, along the tokens that the GPU chose."""
    check_decode(CUDA, family, policy)


def check_decode(device: torch.device, family: str, policy: str, length: int = 150, new: int = 24) -> None:
    """Compare a device's logits with those of the dense reference on the CPU."""
    model, ids = build(*FAMILIES[family]), prompt(length, seed=6)
    config = specache.SpeCacheConfig(policy=policy, slow_tier="ram", group_size=16, residual=16, top_k=8, code="kivi")
    there = build(*FAMILIES[family]).to(device)
    arguments = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = specache.generate(there, ids.to(device), config=config, **arguments)
    tokens = found.sequences[0, length:].tolist()
    expected = reference.generate(model, ids, config, new, forced_tokens=tokens)
    ours = torch.stack([row[0] for row in found.logits]).float().cpu()
    assert (ours - expected.logits).abs().max() <= 5e-3 * expected.logits.abs().max()
