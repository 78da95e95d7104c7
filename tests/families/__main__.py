"""Run every family and print the outcomes; with `--write` record them and write docs/models.md."""

from __future__ import annotations

import argparse
import sys

import transformers

from tests.families import table
from tests.families.compare import Outcome, families, try_family, vision_families


def main() -> int:
    """Return the number of families that are wrong or raise another error than a refusal."""
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {table.DATA.name} and docs/{table.PAGE.name}")
    parser.add_argument("only", nargs="*", help="model types, whose rows alone are replaced; all of them without")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    outcomes = _run(families(), arguments.only)
    vision = _run(vision_families(), arguments.only)
    if arguments.write:
        table.write(outcomes, vision, transformers.__version__, replace=bool(arguments.only))
    return sum(outcome.result in ("wrong", "error") for outcome in outcomes + vision)


def _run(every: list[tuple[str, str]], only: list[str]) -> list[Outcome]:
    outcomes = []
    for model_type, model_class in every:
        if not only or model_type in only:
            outcomes.append(outcome := try_family(model_type, model_class))
            print(f"{outcome.result:10} {model_type:26} {model_class:40} {outcome.reason}", flush=True)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
