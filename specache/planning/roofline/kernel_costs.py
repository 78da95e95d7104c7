"""Count the work of kernels beside reading the low-bit copy: this library's from its source, the
published ones' assumed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

UNPACK_INSTRUCTIONS = 3  # vector instructions per code: shift, mask, convert
TILE_ROWS = 16  # rows of the smallest matrix-unit product; fewer rows take as long


@dataclass(frozen=True)
class KernelCounts:
    """Work per decode step over the low-bit copy.

    Attributes:
        products: matrix-unit products per code, averaged over keys and values.
        score_bytes: bytes of a score, or of a mean score of a KV head.
        score_passes: reads and writes of the scores of all query rows.
        select_passes: further reads and writes of the scores of rows that select their top-k.
        mass_passes: reads and writes of one number per KV head, token and selecting row.
    """

    products: float
    score_bytes: int
    score_passes: int
    select_passes: int
    mass_passes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON. Keys are stable."""
        return asdict(self)


# kernels/triton, for a 16-bit model: a factor of `score` is split in two bfloat16 numbers, one of
# `attend` is rounded to one. float16 scores are written by `score`, read by `attend` and once by
# `select`, whose means over a KV head are 16 bits, written once, read for a digit, counted, and
# read for the positions.
THIS_LIBRARY = KernelCounts(products=1.5, score_bytes=2, score_passes=2, select_passes=1, mass_passes=4)
# An assumption: the paper's kernels are not released, and other counts gave less throughput than it
# reports (docs/plan.md). 16-bit scores are written, turned into probabilities (read and written)
# and read with the values. The draft row's are read to average them; the averages are written,
# searched, and read by top-k.
PUBLISHED = KernelCounts(products=1, score_bytes=2, score_passes=4, select_passes=1, mass_passes=3)
