"""What the parent and the process of a part both know: a part's job, and how a check ended.

Nothing here imports PyTorch, so that the parent starts at once and never holds GPU memory.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

CUDA = "cuda"
PASSED, FAILED, SKIPPED, RUNNING = "passed", "failed", "skipped", "running"


@dataclass(frozen=True)
class PartJob:
    """What the process of a part is given, as JSON.

    Attributes:
        function: see `parts.Part`.
        state: the file to write.
        work: a folder for temporary files of this run, which later parts may use too.
        shared: a folder for what runs of these sources build and compile. It stays.
        tree: the source tree, with the tests; `None` if the package was installed without.
        device: `cpu` or `cuda`.
        seconds: time until the process is killed.
        options: settings of the run.
    """

    function: str
    state: str
    work: str
    shared: str
    tree: str | None
    device: str
    seconds: float
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))
