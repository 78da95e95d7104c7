"""The compile-time constants, warps and stages of each kernel, by the shape of a layer.

Launches and ahead-of-time compilation (`ahead_of_time`) use the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specache.config import Code
from specache.kernels.packing import row_bytes
from specache.kernels.torch.rotated import LEVEL_UNIT
from specache.kernels.types import LowBitKV

SCORE_BLOCK = 256  # tokens of a program of `score`
SPLIT = 512  # tokens of a program of `attend`: fixed, so that rounding does not depend on the batch
SELECT_BLOCK = 4096
MAX_ROWS = 16
SLOT_BLOCK = 2048  # slots of a hot set at a time
QUANTISE_TOKENS = 1024  # tokens rotated at a time


def power_of_two(number: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `number` and `least`."""
    return 1 << (max(number, least) - 1).bit_length()


@dataclass(frozen=True)
class Shape:
    """The shape of a layer for which kernels are compiled.

    Attributes:
        groups: query heads per KV head (`G`).
        queries: queries per sequence and head (`n`).
    """

    code: Code
    bits: int
    group_size: int
    dim: int
    groups: int = 1
    queries: int = 1

    @classmethod
    def of(cls, low_bit_kv: LowBitKV, groups: int = 1, queries: int = 1) -> Shape:
        return cls(low_bit_kv.code, low_bit_kv.bits, low_bit_kv.group_size, low_bit_kv.head_dim, groups, queries)

    @property
    def rotated(self) -> bool:
        return self.code is Code.ROTATED

    @property
    def unit(self) -> float:
        """The factor of a level's whole number."""
        return LEVEL_UNIT[self.bits] if self.rotated else 1.0

    @property
    def padded_dim(self) -> int:
        return power_of_two(self.dim, 32)

    @property
    def value_group(self) -> int:
        """Channels that share a scale of values in `attend`."""
        return self.padded_dim if self.rotated or self.group_size >= self.dim else self.group_size

    @property
    def padded_bytes(self) -> int:
        """Bytes of a row of key codes."""
        return power_of_two(row_bytes(self.dim, self.bits), 4)


def _compiler(warps: int, fused: bool = True, stages: int = 3) -> dict[str, Any]:
    """Return compiler options.

    Args:
        fused: whether a product and a sum may be fused. Not where codes are computed, which must be
            equal on all devices.
    """
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fused}


def score(shape: Shape, softcap: bool, half: bool) -> dict[str, Any]:
    return {
        "ROTATED": shape.rotated,
        "BITS": shape.bits,
        "GROUP": shape.group_size,
        "DIM": shape.dim,
        "CHUNK": min(shape.padded_dim, 64),
        **_queries(shape, MAX_ROWS),
        "SOFTCAP": softcap,
        "HALF": half,
        "BLOCK": SCORE_BLOCK,
        **_compiler(4),
    }


def _queries(shape: Shape, most: int) -> dict[str, int]:
    """Return the queries that share a pass over the codes: `G n`, or blocks of up to `most`."""
    queries = shape.groups * shape.queries
    padded = min(power_of_two(queries, 8), most)
    return {"ROWS": queries, "ROWS_P": padded, "ROW_BLOCKS": -(-queries // padded)}


def rescore(dim: int, groups: int, softcap: bool, group_size: int) -> dict[str, Any]:
    """Return options of `rescore`. group_size: that of float16 scores, 0 for float32 scores."""
    return {
        "G": groups,
        "G_P": power_of_two(groups, 8),
        "DIM": dim,
        "CHUNK": min(power_of_two(dim, 32), 64),
        "SOFTCAP": softcap,
        "GROUP": max(group_size, 1),
        "HALF": group_size > 0,
        "BLOCK": 16,
        **_compiler(4),
    }


def fetched(dim: int, groups: int, half: bool) -> dict[str, Any]:
    return {
        "G": groups,
        "G_P": power_of_two(groups, 8),
        "DIM": dim,
        "DIM_P": power_of_two(dim, 32),
        "HALF": half,
        "BLOCK": 32,
        **_compiler(8 if dim > 128 else 4, stages=2),
    }


def attend_low_bit(shape: Shape, half: bool, split: int = SPLIT) -> dict[str, Any]:
    wide = shape.padded_dim > 128
    return {
        "ROTATED": shape.rotated,
        "BITS": shape.bits,
        "GROUP": shape.value_group,
        "DIM": shape.dim,
        "DIM_P": shape.padded_dim,
        **_queries(shape, MAX_ROWS if half or not wide else 8),
        "HALF": half,
        "KEY_GROUP": shape.group_size,
        "SPLIT": split,
        **_compiler(8 if wide else 4, stages=2),  # a third stage spills registers
    }


def merge(shape: Shape, parts: int, fetched: bool) -> dict[str, Any]:
    return {
        "ROTATED": shape.rotated,
        "FETCHED": fetched,
        "ROWS": shape.groups * shape.queries,
        "DIM": shape.dim,
        "DIM_P": shape.padded_dim,
        "PARTS_P": power_of_two(parts),
        **_compiler(1),
    }


def select(**constants: int) -> dict[str, Any]:
    return {**constants, "BLOCK": constants.get("BLOCK", SELECT_BLOCK), **_compiler(8)}


def select_parts(group_size: int) -> dict[str, Any]:
    return {"GROUP": group_size, "GROUPS": 1024 // group_size, **_compiler(4)}


def select_normaliser(group_size: int) -> dict[str, Any]:
    return {"GROUP": group_size, "BLOCK": 512, **_compiler(4)}


def gather(width: int) -> dict[str, Any]:
    return {"WIDTH": width, "WIDTH_P": power_of_two(width), "BLOCK": 16, **_compiler(4)}


def recent(dim: int, queries: int, n: int, softcap: bool, sinks: bool, exact: bool) -> dict[str, Any]:
    wide = dim > 128
    return {
        "N": n,
        "ROWS": queries,
        "ROWS_P": min(power_of_two(queries, 8), 8 if wide else MAX_ROWS),
        "DIM": dim,
        "DIM_P": power_of_two(dim, 32),
        "SOFTCAP": softcap,
        "SINKS": sinks,
        "BLOCK": 16 if exact and wide else 32,
        **_compiler(8 if wide else 4, stages=2),
    }


def join(dim: int, queries: int, n: int) -> dict[str, Any]:
    return {"N": n, "ROWS": queries, "DIM": dim, "DIM_P": power_of_two(dim), **_compiler(1)}


def claim(ahead: bool, k: int, block: int = SLOT_BLOCK) -> dict[str, Any]:
    return {"AHEAD": ahead, "BLOCK": block, "BLOCK_K": min(power_of_two(k, 32), 1024), **_compiler(8)}


def hot_rows(width: int) -> dict[str, Any]:
    """Return options of kernels that copy rows: few per program, to spread a head over programs."""
    return {"WIDTH": width, "WIDTH_P": power_of_two(width), "BLOCK": 8, **_compiler(4)}


def kivi_keys(shape: Shape) -> dict[str, Any]:
    return {
        "BITS": shape.bits,
        "GROUP": shape.group_size,
        "DIM": shape.dim,
        "BYTES_P": shape.padded_bytes,
        **_compiler(8, fused=False),
    }


def kivi_values(shape: Shape) -> dict[str, Any]:
    group = min(shape.group_size, shape.dim)
    return {"BITS": shape.bits, "GROUP": group, "GROUP_P": power_of_two(group), "DIM": shape.dim, **_compiler(4, fused=False)}


def centre_keys(shape: Shape) -> dict[str, Any]:
    return {"GROUP": shape.group_size, "DIM": shape.dim, "DIM_P": shape.padded_dim, **_compiler(8, fused=False)}


def rotated_keys(shape: Shape) -> dict[str, Any]:
    return {"BITS": shape.bits, "DIM": shape.dim, "BYTES_P": shape.padded_bytes, "TOKENS": 16, **_compiler(8, fused=False)}


def rotated_values(shape: Shape) -> dict[str, Any]:
    return {
        "BITS": shape.bits,
        "DIM": shape.dim,
        "DIM_P": shape.padded_dim,
        **_compiler(min(max(shape.padded_dim // 32, 2), 8), fused=False),
    }
