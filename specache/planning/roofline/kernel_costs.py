"""What kernels do beside reading the low-bit copy: this library's as its source has it, the published methods' as it is assumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

UNPACK_INSTRUCTIONS = 3  # of the vector units per code: shift, mask, convert
TILE_ROWS = 16  # rows of the smallest product on matrix units; fewer take as long


@dataclass(frozen=True)
class KernelCounts:
    """Work per decode step over the low-bit copy.

    Attributes:
        products: on the matrix units, per code; keys and values on average.
        score_bytes: of a score, or of a number per KV head made from them.
        score_passes: over the scores of all rows, written or read.
        select_passes: more of them over the scores of rows whose `k` largest are wanted.
        mass_passes: over one number per KV head, token and such a row.
    """

    products: float
    score_bytes: int
    score_passes: int
    select_passes: int
    mass_passes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Keys are stable."""
        return asdict(self)


# kernels/triton, for a 16-bit model: a factor of `score` is split in two bfloat16 numbers, one of `attend` is rounded to one.
# float16 scores are written by `score`, read by `attend` and once by `select`, whose means over a KV head are 16 bits, written
# once, read for a digit, counted, and read for the positions.
THIS_LIBRARY = KernelCounts(products=1.5, score_bytes=2, score_passes=2, select_passes=1, mass_passes=4)
# An assumption, settled after others had given less throughput (docs/plan.md): the paper's kernels are not released. 16-bit scores
# are written, turned into probabilities (read and written) and read with the values; the guess row's are read to average them, the
# averages written, searched and read by top-k.
PUBLISHED = KernelCounts(products=1, score_bytes=2, score_passes=4, select_passes=1, mass_passes=3)
