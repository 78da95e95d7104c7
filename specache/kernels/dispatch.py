"""The kernels' signatures, and which implementation serves each.

Every operation takes a ragged batch: one `LowBitCopy` per sequence. A backend registers a module with these names; the plain
PyTorch one has them all and is the fallback.

    quantise(keys [Hkv, n, D], values [Hkv, n, D], copy, start) -> None
        writes tokens `[start, start + n)` into the copy's pages; `start` and `n` are whole groups
    score(query [B, Hq, n, D], copies, lengths, scaling, softcap) -> float32 scores [B, Hkv, G, n, S], -inf past a sequence's length
    rescore(query, scores, positions [B, Hkv, n, k], rows [B, Hkv, n, k, 2D], scaling, softcap) -> None
        puts exact scores of the fetched keys in place; position -1 means no pair
    select(scores, rest_lse [B, Hkv, G, n], lengths, k) -> positions [B, Hkv, n, k], ascending, ties to the lower, -1 padding
    attend(scores, positions, rows, copies, lengths) -> (out [B, Hkv, G, n, D], lse [B, Hkv, G, n]); destroys scores

`rest_lse` is the log-sum-exp of everything a row sees outside the copy. Paper: Algorithm 3; layout: KIVI.
"""

from __future__ import annotations

from specache.kernels import torch_ops

OPERATIONS = ("quantise", "score", "rescore", "select", "attend")

quantise = torch_ops.quantise
score = torch_ops.score
rescore = torch_ops.rescore
select = torch_ops.select
attend = torch_ops.attend


def active() -> dict[str, str]:
    """Operation -> name of the backend that serves it, for `specache doctor`."""
    return {operation: "torch" for operation in OPERATIONS}
