"""transformers' offloaded cache: all layers in main memory, the next one copied to the GPU."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from specache.bench.compute_device import CUDA
from specache.bench.contenders import StockContender
from specache.bench.workload import Workload
from specache.errors import ConfigError

RESIDENT = 3  # layers on the GPU: the one that runs, what it becomes when a token is appended, and the next one


class OffloadedContender(StockContender):
    """The stock model with a cache that moves to the GPU layer by layer.

    Raises:
        ConfigError: the model is on a CPU.
    """

    impl = "offloaded"

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        if work.info.device.type != CUDA:
            raise ConfigError("transformers' offloaded cache moves between GPU and main memory: it needs --device cuda")
        self.cache = f"{work.info.dtype} in main memory".removeprefix("torch.")
        self.needed_bytes = RESIDENT * work.exact_bytes // len(work.layer_shapes)
        self.host_bytes = work.exact_bytes
        self.read_bytes = work.dimensions.read_bytes + work.exact_bytes

    def new_cache(self) -> Any:
        return DynamicCache(config=self.work.model.config, offloading=True)
