"""Measure the divergence of each policy from the full cache, along the full cache's answer.

    python benchmarks/policies.py [-m MODEL] [--text FILE] [--tokens 5000] [--new 100]
                                  [--code rotated] [--top-k 64] [--residual 64] [--json FILE]

Every policy is teacher-forced along the full cache's greedy answer. Prints, per bits and policy,
the mean Kullback-Leibler divergence per token, its 95th percentile, top-1 agreement, and how often
draft tokens and prefetches were right. The paper's R = k = 64 are taken at any bits, not what the
library takes by default. `kivi` is KIVI's code alone with R = 128: the same 16-bit bytes.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import specache
from specache.cli.models import Dtype, load

POLICIES = ("none", "speculative", "previous", "on-demand", "verified")
QUESTION = "Summarize the text above in a few paragraphs."


class Forced(LogitsProcessor):
    """Makes a given answer the only possible one, from the end of the prompt on."""

    def __init__(self, answer: list[int], prompt_length: int) -> None:
        self.answer = answer
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.answer[input_ids.shape[1] - self.prompt_length]] = 0.0
        return forced


def prompt_ids(tokenizer: Any, text: str, tokens: int, question: str = QUESTION) -> Tensor:
    """Return the chat prompt for the first `tokens` tokens of a text, [1, S]."""
    document = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])
    messages = [{"role": "user", "content": f"{document}\n\n{question}"}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]


def full_answer(model: Any, ids: Tensor, new: int) -> tuple[list[int], Tensor]:
    """Return the full cache's greedy answer of `new` tokens and its logits [new, V]."""
    config = specache.SpeCacheConfig(policy="full")
    output = specache.generate(
        model,
        ids,
        config=config,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    output.past_key_values.close()
    return output.sequences[0, ids.shape[1] :].tolist(), torch.cat(output.logits)


def compare(model: Any, ids: Tensor, answer: list[int], reference: Tensor, cache: specache.SpeCache) -> dict[str, Any]:
    """Measure one policy along `answer`: the divergence of every token's distribution.

    Args:
        reference: the full cache's logits [new, V].
    """
    forced = LogitsProcessorList([Forced(answer, ids.shape[1])])
    output = specache.generate(
        model,
        ids,
        past_key_values=cache,
        max_new_tokens=len(answer),
        eos_token_id=[],
        logits_processor=forced,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat(output.logits)
    expected, actual = reference.log_softmax(-1), logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - actual)).sum(-1)[1:]  # the first token comes from the exact prefill
    stats = cache.stats()
    return {
        "kl": divergence.mean().item(),
        "kl_p95": divergence.quantile(0.95).item(),
        "top1": (reference.argmax(-1) == logits.argmax(-1)).float().mean().item(),
        **{name: stats[name] for name in ("fast_ratio", "hot_ratio", "hit_rate", "guess_rate", "tokens_per_s")},
    }


def measure(
    model: Any, ids: Tensor, answer: list[int], reference: Tensor, bits: int, code: str, top_k: int, residual: int
) -> list[dict[str, Any]]:
    """Measure all policies at `bits`.

    The policies share one prefill. `kivi` has its own, with R = 128.
    """
    rows = []
    base = specache.SpeCacheConfig(bits=bits, code=code, top_k=top_k, residual=residual, slow_tier="ram", policy="verified")
    kivi = specache.SpeCacheConfig(bits=bits, code="kivi", residual=128, slow_tier="ram", policy="none")
    with specache.SpeCache(model, kivi) as cache:
        rows.append({"bits": bits, "policy": "kivi (R = 128)", **compare(model, ids, answer, reference, cache)})
    with specache.SpeCache(model, base) as prefilled:
        specache.prefill(model, ids, cache=prefilled)
        for policy in POLICIES:
            with prefilled.fork(policy=policy) as cache:
                rows.append({"bits": bits, "policy": policy, **compare(model, ids, answer, reference, cache)})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(title="Divergence from the full cache")
    columns = ("bits", "policy", "kl", "kl_p95", "top1", "fast_ratio", "hot_ratio", "hit_rate", "guess_rate", "tokens_per_s")
    for column in columns:
        result.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        result.add_row(*("-" if row[c] is None else f"{row[c]:.4f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--text", type=Path, help="document; default: Python's own help topics")
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--code", default="rotated", choices=[str(code) for code in specache.Code])
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--residual", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=[str(d) for d in Dtype])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    loaded = load(options.model, dtype=Dtype(options.dtype))
    topics = pydoc_data.topics.topics
    text = options.text.read_text() if options.text else "\n".join(topics[name] for name in sorted(topics))
    ids = prompt_ids(loaded.tokenizer, text, options.tokens)
    answer, reference = full_answer(loaded.model, ids, options.new)
    rows: list[dict[str, Any]] = []
    for bits in options.bits:
        rows += measure(loaded.model, ids, answer, reference, bits, options.code, options.top_k, options.residual)
    Console(width=140).print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"prompt_tokens": ids.shape[1], "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
