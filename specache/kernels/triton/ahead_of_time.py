"""Compile every kernel without a GPU: registers, spills and shared memory per target.

    python -m specache.kernels.triton.ahead_of_time [--write docs/gpu_kernels.md] [--quick]

It generates the table of `docs/gpu_kernels.md`; the tests compile the `quick` part of it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from specache.config import Code
from specache.errors import ConfigError
from specache.kernels import triton as triton_kernels
from specache.kernels.triton import launch_options as options
from specache.kernels.triton.launch_options import Shape

# Maximum shared memory of a block, KiB, by compute capability (CUDA C++ Programming Guide).
SHARED_MEMORY_KIB = {80: 163, 86: 99, 89: 99, 90: 227}
HALF = ", 16-bit scores"  # suffix of the selection of a 16-bit model, which can run both
OF_ROWS = (
    "merge",
    "rescore",
    "attend fetched",
    "select peaks",
    "select mean_prob",
    "select parts" + HALF,
    "select normaliser" + HALF,
    "select mean_prob" + HALF,
    "select digit",
    "select digit" + HALF,
    "select count",
    "select count" + HALF,
    "select positions",
    "select positions" + HALF,
    "gather",
    "hot set: claim",
    "hot set: read ahead",
    "hot set: lookup",
    "hot set: fill",
    "recent",
    "join",
)  # kernels that read no codes
EXACT = ("rescore", "attend fetched", "recent")  # those with products in float32
BEGIN, END = "<!-- resources -->\n", "<!-- /resources -->\n"

_TYPES = {
    **dict.fromkeys(("scores", "rest_lse", "peaks", "totals", "sums", "low_bit_sums", "fetched_sums", "out", "low_bit"), "*fp32"),
    **dict.fromkeys(("lse", "own_lse", "low_bit_lse", "recent_lse", "recent", "low_bit_out", "sinks"), "*fp32"),
    **dict.fromkeys(("rotated_query", "channel_scales", "levels", "references", "normaliser", "kept", "exact"), "*fp32"),
    **dict.fromkeys(("addresses", "positions", "stored", "counts"), "*i64"),
    **dict.fromkeys(("missing", "claimed", "found", "wanted", "here", "victims", "counters", "source"), "*i64"),
    **dict.fromkeys(("lengths", "mean_prob", "histogram", "above", "equal", "table", "owner", "used", "tick"), "*i32"),
    **dict.fromkeys(("scaling", "softcap", "unit"), "fp32"),
    "finite": "*u8",
}
_HALF_TYPES = {"scores": "*fp16", "mean_prob": "*i16"}
_ROWS = ("query", "kv_rows", "keys", "values", "hot", "residual")  # in the model's dtype
_ALIGNED = ("key_codes", "key_scale", "key_bias", "key_zero", "key_mean", "value_codes", "value_scale", "value_zero")


@dataclass(frozen=True)
class Variant:
    """A kernel of a layer, and the dtype of the model's rows ("bf16", "fp16", "fp32")."""

    kernel: str
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Resources:
    """The resources that a compiled kernel takes of a multiprocessor.

    Attributes:
        registers: per thread.
        spills: bytes of a thread's stack frame: registers that did not fit.
        shared: bytes of shared memory per block.
        warps: per block.
    """

    registers: int
    spills: int
    shared: int
    warps: int


def kernels(shape: Shape, dtype: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return name -> (kernel, its constants and options) for a layer."""
    from specache.kernels.triton import attend, gather, hot_rows, quantise, recent, score, select

    half, dim = dtype != "fp32", shape.dim  # a 16-bit model has 16-bit scores
    groups, group, queries = shape.groups, shape.group_size, shape.groups * shape.queries
    found = {
        "score": (score.score_kernel, options.score(shape, False, half)),
        "attend": (attend.low_bit_kernel, options.attend_low_bit(shape, half)),
        "merge": (attend.merge_kernel, options.merge(shape, 64, True)),
        "rescore": (score.rescore_kernel, options.rescore(dim, groups, False, group if half else 0)),
        "attend fetched": (attend.fetched_kernel, options.fetched(dim, groups, half)),
        "select peaks": (select.peaks_kernel, options.select()),
        "select mean_prob": (select.mean_prob_kernel, options.select(G=groups, BLOCKS_P=32)),
        "select parts" + HALF: (select.parts_kernel, options.select_parts(group)),
        "select normaliser" + HALF: (select.normaliser_kernel, options.select_normaliser(group)),
        "select mean_prob" + HALF: (select.half_mean_prob_kernel, options.select(G=groups, GROUP=group)),
        "select digit": (select.digit_kernel, options.select(NUMBER=31, DIGIT=3)),
        "select digit" + HALF: (select.digit_kernel, options.select(NUMBER=16, DIGIT=1)),
        "select count": (select.count_kernel, options.select(NUMBER=31)),
        "select count" + HALF: (select.count_kernel, options.select(NUMBER=16)),
        "select positions": (select.positions_kernel, options.select(NUMBER=31, BLOCKS_P=32)),
        "select positions" + HALF: (select.positions_kernel, options.select(NUMBER=16, BLOCKS_P=32)),
        "gather": (gather.gather_kernel, options.gather(2 * dim)),
        "hot set: claim": (hot_rows.claim_kernel, options.claim(False, 64)),
        "hot set: read ahead": (hot_rows.claim_kernel, options.claim(True, 1024)),
        "hot set: lookup": (hot_rows.lookup_kernel, options.hot_rows(2 * dim)),
        "hot set: fill": (hot_rows.fill_kernel, {**options.hot_rows(2 * dim), "MAPPED": True, "JOIN": True}),
        "recent": (recent.recent_kernel, options.recent(dim, queries, shape.queries, False, True, not half)),
        "join": (recent.join_kernel, options.join(dim, queries, shape.queries)),
    }
    if shape.rotated:
        found["quantise centre"] = (quantise.centre_keys_kernel, options.centre_keys(shape))
        found["quantise keys"] = (quantise.rotated_keys_kernel, options.rotated_keys(shape))
        found["quantise values"] = (quantise.rotated_values_kernel, options.rotated_values(shape))
    else:
        found["quantise keys"] = (quantise.kivi_keys_kernel, options.kivi_keys(shape))
        found["quantise values"] = (quantise.kivi_values_kernel, options.kivi_values(shape))
    return found


def compile_variant(variant: Variant, capability: int, **changes: Any) -> Resources:
    """Compile for `sm_<capability>` and return the binary's resources.

    Args:
        changes: other options of the compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    source, compiler_options = source_of(variant)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**compiler_options, **changes})
    return _inspect(compiled.asm["cubin"], compiled.metadata.shared, compiled.metadata.num_warps)


def source_of(variant: Variant, ones: Collection[str] = ()) -> tuple[Any, dict[str, Any]]:
    """Return a variant's `ASTSource` and its compiler options.

    Args:
        ones: integer arguments that are 1, which a launch makes constants.
    """
    from triton.compiler import ASTSource

    kernel, settings = kernels(variant.shape, variant.dtype)[variant.kernel]
    constants = {name: value for name, value in settings.items() if name.isupper()}
    compiler_options = {name: value for name, value in settings.items() if not name.isupper()}
    signature = {name: _type_of(name, variant) for name in kernel.arg_names if name not in constants}
    constants |= dict.fromkeys(("stride_d", *ones), 1)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in _ALIGNED
    }
    constants_by_place = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, signature, constants_by_place, aligned), compiler_options


def integer_arguments(variant: Variant) -> list[str]:
    """Return the kernel's integer arguments that can be any number."""
    kernel, settings = kernels(variant.shape, variant.dtype)[variant.kernel]
    return [name for name in kernel.arg_names if name not in (*settings, *_ALIGNED) and _type_of(name, variant) == "i32"]


def _type_of(name: str, variant: Variant) -> str:
    half = variant.kernel.endswith(HALF) if variant.kernel.startswith("select") else variant.dtype != "fp32"
    if half and name in _HALF_TYPES:
        return _HALF_TYPES[name]
    if name in _ROWS:
        rotated_input = variant.shape.rotated and variant.kernel in ("quantise keys", "quantise values")
        return "*fp32" if rotated_input else f"*{variant.dtype}"
    if name == "out" and variant.kernel in ("gather", "hot set: lookup", "hot set: fill", "join"):
        return f"*{variant.dtype}"
    return _TYPES.get(name, "i32")


def _inspect(cubin: bytes, shared: int, warps: int) -> Resources:
    """Return the resources of the only kernel of a cubin, by `cuobjdump`."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}
    return Resources(usage["REG"], max(usage["STACK"], usage["LOCAL"]), shared, warps)


def compile_all(variants: Sequence[Variant], targets: Sequence[int], processes: int) -> dict[tuple[Variant, int], Resources]:
    """Compile every variant for every target, in parallel processes."""
    jobs = [(variant, target) for variant in variants for target in targets]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(compile_variant, *zip(*jobs, strict=True)), strict=True))


def quick_variants() -> list[Variant]:
    """Return the most demanding variants: most registers, widest heads, most queries."""
    shapes = [
        Shape(Code.KIVI, 2, 64, 128, 8, 2),
        Shape(Code.ROTATED, 2, 64, 128, 8, 2),
        Shape(Code.KIVI, 1, 32, 256, 8, 2),
        Shape(Code.ROTATED, 4, 64, 256, 8, 2),
    ]
    reads_codes = [Variant(kernel, shape, "bf16") for shape in shapes for kernel in ("score", "attend")]
    exact = [Variant(kernel, Shape(Code.KIVI, 2, 32, 256, 8, 2), "fp32") for kernel in ("score", "attend", *EXACT)]
    quantising = [
        Variant(kernel, Shape(code, bits, 64, 256, 8, 2), "bf16")
        for code, bits in ((Code.KIVI, 1), (Code.ROTATED, 4))
        for kernel in kernels(Shape(code, bits, 64, 256, 8, 2), "bf16")
        if kernel.startswith("quantise")
    ]
    of_rows = [Variant(kernel, Shape(Code.ROTATED, 2, 64, 256, 8, 2), "bf16") for kernel in OF_ROWS]
    return [*reads_codes, *exact, *quantising, *of_rows]


def table_variants() -> list[Variant]:
    """Return the variants of the documentation's table.

    Code x bits x head dimension x queries, and the kernels that read no codes.
    """
    found = []
    for code in (Code.KIVI, Code.ROTATED):
        for bits in (1, 2, 4):
            for dim, queries in ((64, 2), (128, 1), (128, 2), (256, 2)):
                shape = Shape(code, bits, 64, dim, 4, queries)
                names = ["score", "attend"]
                if queries == 2 and dim > 64:
                    names += [kernel for kernel in kernels(shape, "bf16") if kernel.startswith("quantise")]
                found += [Variant(name, shape, "bf16") for name in names]
    found += [Variant(kernel, Shape(Code.ROTATED, 2, 64, 128, 4, 2), "bf16") for kernel in OF_ROWS]
    return list(dict.fromkeys([*found, *quick_variants()]))


def problems(found: dict[tuple[Variant, int], Resources]) -> list[str]:
    """Return the violations: spills, and more shared memory than the target has."""
    wrong = []
    for (variant, target), resources in found.items():
        limit = SHARED_MEMORY_KIB[target] * 1024
        if resources.spills:
            wrong.append(f"{variant} spills {resources.spills} bytes on sm_{target}")
        if resources.shared > limit:
            wrong.append(f"{variant} takes {resources.shared} bytes of shared memory on sm_{target}, which has {limit}")
    return wrong


def markdown(found: dict[tuple[Variant, int], Resources]) -> str:
    """Return a table with a row per variant: registers and shared memory (KiB) on each target."""
    targets = sorted({target for _, target in found})
    lines = [
        "| kernel | code | bits | g | D | G n | rows | warps | " + " | ".join(f"sm_{target}" for target in targets) + " |",
        "|---|---|---|---|---|---|---|---|" + "---|" * len(targets),
    ]
    for variant in dict.fromkeys(variant for variant, _ in found):
        shape, each = variant.shape, [found[variant, target] for target in targets]
        named = [shape.code.value, shape.bits, shape.group_size] if variant.kernel not in OF_ROWS else ["-", "-", "-"]
        cells = [variant.kernel, *named, shape.dim, shape.groups * shape.queries, variant.dtype, each[0].warps]
        cells += [f"{r.registers} / {r.shared / 1024:.0f}" + (f", spills {r.spills}" if r.spills else "") for r in each]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def show(found: dict[tuple[Variant, int], Resources]) -> None:
    """Print the same table to the terminal."""
    header, _, *rows = (line.strip("| ").split(" | ") for line in markdown(found).splitlines())
    table = Table(*header, title="registers per thread / shared memory per block (KiB)")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time and show what they take.")
    parser.add_argument("--quick", action="store_true", help="only the hardest variants")
    parser.add_argument("--write", type=Path, help="put the table into this Markdown file, between its two marks")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if triton_kernels.interpreted():
        raise ConfigError(f"{triton_kernels.INTERPRETER}=1 is set: the interpreter compiles nothing.")
    found = compile_all(quick_variants() if arguments.quick else table_variants(), list(SHARED_MEMORY_KIB), arguments.processes)
    show(found)
    if arguments.write:
        text = arguments.write.read_text()
        before, rest = text.split(BEGIN)
        arguments.write.write_text(before + BEGIN + markdown(found) + END + rest.split(END)[1])
    for problem in problems(found):
        print(problem, file=sys.stderr)
    return bool(problems(found))


if __name__ == "__main__":
    sys.exit(main())
