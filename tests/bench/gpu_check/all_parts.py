"""Every part, one after the other in one process, which imports PyTorch and transformers once."""

from __future__ import annotations

from specache.bench.gpu_check.checks import PartRun
from specache.bench.gpu_check.parts import PARTS


def run(part: PartRun) -> None:
    for one in PARTS:
        one.load()(part)
        part.options["facts"] = {**part.options["facts"], **part.facts}  # as the runner hands them to later parts
