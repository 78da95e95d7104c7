"""The command. It leaves with 0 if every chosen part has passed, now or before."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from specache.bench.gpu_check import result_page as report
from specache.bench.gpu_check.part_runner import Run, run_parts
from specache.bench.gpu_check.parts import PARTS, chosen_parts
from specache.errors import SpeCacheError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m specache.bench.gpu_check", description=(__doc__ or "").strip())
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the results; the same one resumes")
    parser.add_argument("--parts", help="which parts: 1-4, or 2,5. " + ", ".join(f"{p.number} {p.name}" for p in PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to test the check itself")
    parser.add_argument("--again", action="store_true", help="repeat parts that have passed")
    parser.add_argument("--slack", type=float, default=1.0, help="factor of every part's time limit")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        parts = chosen_parts(chosen.parts)
        results = run_parts(parts, Run(chosen.out, chosen.device, chosen.again, chosen.slack), lambda text: print(text, flush=True))
    except SpeCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {chosen.out} has what was found. The same command goes on.", file=sys.stderr)
        return 130
    print((chosen.out / report.TEXT_NAME).read_text(), flush=True)
    return 0 if all(results.passed(part.number) for part in parts) else 1


def _interrupted(number: int, frame: FrameType | None) -> None:
    """End as at Ctrl-C: the running part is killed, and what it found is kept."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
