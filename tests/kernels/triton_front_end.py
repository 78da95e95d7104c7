"""Translate every Triton kernel as a launch does whose integer arguments are 1.

Run it in a process of its own, where Triton compiles and does not interpret. It prints every
failure, and exits with 1 if there is one. A launch makes an argument of 1 a constant, which has
none of a tensor's methods. The interpreter does not, so it runs code that no GPU compiles.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.compiler.errors import CompilationError

from specache.config import Code
from specache.kernels.triton import ahead_of_time
from specache.kernels.triton.ahead_of_time import HALF, Variant
from specache.kernels.triton.launch_options import Shape

TARGET = GPUTarget("cuda", 80, 32)


def translate(variant: Variant, ones: list[str]) -> None:
    """Translate a kernel into Triton's IR, the first stage of its compilation."""
    source, options = ahead_of_time.source_of(variant, ones)
    backend, context = make_backend(TARGET), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parsed = backend.parse_options(options)
    source.make_ir(TARGET, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)


def variants() -> Iterator[Variant]:
    for code, dtype in ((Code.KIVI, "bf16"), (Code.ROTATED, "fp32")):
        shape = Shape(code, 2, 64, 64, 4, 2)
        for kernel in ahead_of_time.kernels(shape, dtype):
            if dtype == "bf16" or not kernel.endswith(HALF):
                yield Variant(kernel, shape, dtype)


def main() -> int:
    failed = translated = 0
    for variant in variants():
        for argument in ahead_of_time.integer_arguments(variant):
            translated += 1
            try:
                translate(variant, [argument])
            except CompilationError as error:
                failed += 1
                print(f"{variant.kernel}, {variant.dtype}, {argument} = 1: {error}")
    print(f"{translated} translated")
    return failed > 0 or not translated


if __name__ == "__main__":
    sys.exit(main())
