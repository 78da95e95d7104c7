"""Measure the fidelity cost of a GPU's 16-bit scores, by the same rounding on a CPU.

    python benchmarks/gpu_rounding.py [-m MODEL] [--text FILE] [--tokens 3000] [--texts 3]
                                      [--new 64] [--json FILE]

In a step over static buffers, Triton's kernels round for a 16-bit model: they keep scores in
float16, relative to the largest of their group, search 16 bits of the probabilities, and round the
weights of the low-bit copy to bfloat16. Here PyTorch's kernels over the same buffers do the same.
Prints, per text and bits, the mean Kullback-Leibler divergence per token from the full cache, along
the full cache's greedy answer.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from policies import compare, full_answer, prompt_ids
from rich.console import Console
from rich.table import Table
from torch import Tensor

import specache
from specache.cli.models import Dtype, load
from specache.device import batch
from specache.device.page_kernels import TorchPages
from specache.engine import static_decoder
from specache.kernels.torch import operations
from specache.kernels.triton.tables import PageScores, PageTables
from specache.kernels.types import LowBitKV

CHARACTERS = 6  # per token at most; decides where the next text begins
ON_THE_CPU = static_decoder.StaticSettings(capacity_step=256, devices=("cpu",))


class Rounded(TorchPages):
    """PyTorch's kernels with the rounding of Triton's."""

    def score(
        self, query: Tensor, tables: PageTables, channel_scales: Tensor | None, scaling: float, softcap: float | None
    ) -> PageScores:
        scores = super().score(query, tables, channel_scales, scaling, softcap).values
        grouped = scores.unflatten(-1, (-1, self._layout.group_size))
        largest = grouped.amax(-1, keepdim=True).clamp(min=-1e30)
        return PageScores(((grouped - largest).half().float() + largest).flatten(-2))

    def select(self, scores: PageScores, rest_lse: Tensor, lengths: Tensor, k: int) -> Tensor:
        exact = operations.mean_probabilities

        def upper_bits(*arguments: Tensor) -> Tensor:
            return (exact(*arguments).view(torch.int32) & ~0x7FFF).view(torch.float32)

        with mock.patch.object(operations, "mean_probabilities", upper_bits):
            return super().select(scores, rest_lse, lengths, k)

    def _values(self, low_bit_kv: LowBitKV, weights: Tensor) -> Tensor:
        return super()._values(low_bit_kv, weights.bfloat16().float())


def divergence(model: Any, ids: Tensor, answer: list[int], reference: Tensor, bits: int, kernels: type[TorchPages]) -> float:
    """Return the mean KL divergence per token, in nats."""
    config = specache.SpeCacheConfig(bits=bits, slow_tier="ram", policy="verified")
    with (
        mock.patch.object(static_decoder, "SETTINGS", ON_THE_CPU),
        mock.patch.object(batch, "page_kernels", lambda layout, device: kernels(layout)),
        specache.SpeCache(model, config) as cache,
    ):
        found: float = compare(model, ids, answer, reference, cache)["kl"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--text", type=Path, help="default: Python's own documentation")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    topics = pydoc_data.topics.topics
    text = arguments.text.read_text() if arguments.text else "\n\n".join(topics[name] for name in sorted(topics))
    loaded = load(arguments.model, dtype=Dtype.BFLOAT16)
    results = []
    table = Table("text", "bits", "float32 scores", "as on a GPU", title="KL divergence from the full cache, nats per token")
    for number in range(arguments.texts):
        ids = prompt_ids(loaded.tokenizer, text[number * CHARACTERS * arguments.tokens :], arguments.tokens)
        answer, reference = full_answer(loaded.model, ids, arguments.new)
        for bits in (2, 1):
            found = [divergence(loaded.model, ids, answer, reference, bits, kernels) for kernels in (TorchPages, Rounded)]
            results.append({"text": number, "tokens": ids.shape[1], "bits": bits, "float32": found[0], "rounded": found[1]})
            table.add_row(str(number), str(bits), *(f"{one:.5f}" for one in found))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
