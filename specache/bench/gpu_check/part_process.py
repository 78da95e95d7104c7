"""The process of one part: `python -m specache.bench.gpu_check.part_process JOB`, a JSON file.

It leaves with 0 if the part ran to its end, whatever its checks found; the state file has that.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

from specache.bench.gpu_check.process import die_with_parent

BROKEN = 3  # exit code: the GPU's context was lost on the way


def main() -> int:
    die_with_parent()
    faulthandler.enable()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # `process` asks where a part hangs
    from specache.bench.gpu_check.checks import PartBroken, PartJob, PartRun
    from specache.bench.gpu_check.parts import Part

    job = PartJob(**json.loads(Path(sys.argv[1]).read_text()))
    part = PartRun(job)
    try:
        Part(0, "", job.function, 0).load()(part)
    except PartBroken as error:
        part.note(f"The rest of this part was not run, since the GPU could no longer be used by its process: {error}")
        part.finish()
        sys.stdout.flush()
        os._exit(BROKEN)  # destructors would use the lost context
    part.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
