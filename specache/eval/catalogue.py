"""The registries of tasks and methods by name.

A new one is one file and one line here. Its module is imported only when it is asked for.
"""

from __future__ import annotations

from typing import Any

from specache.platform.registry import named_class

_LISTED = "See 'specache eval list'."

TASKS = {
    "fidelity": "specache.eval.tasks.fidelity:Fidelity",
    "perplexity": "specache.eval.tasks.perplexity:Perplexity",
    "needle": "specache.eval.tasks.needle:Needle",
    "ruler": "specache.eval.tasks.ruler:Ruler",
    "longbench": "specache.eval.tasks.longbench:LongBench",
    "retrieval": "specache.eval.tasks.retrieval:Retrieval",
    "multi-needle": "specache.eval.tasks.multi_needle:MultiNeedle",
    "table": "specache.eval.tasks.table:Table",
    "compare": "specache.eval.tasks.compare:Compare",
    "extract": "specache.eval.tasks.extract:Extract",
}

METHODS = {
    "full": "specache.eval.methods.specache:FullMethod",
    "specache": "specache.eval.methods.specache:SpeCacheMethod",
    "kivi": "specache.eval.methods.specache:KiviMethod",
    "quantized": "specache.eval.methods.quantized:QuantizedMethod",
    "offloaded": "specache.eval.methods.offloaded_cache:OffloadedMethod",
    "streaming-llm": "specache.eval.methods.streaming_llm:StreamingLLMMethod",
    "h2o": "specache.eval.methods.h2o:H2OMethod",
    "snapkv": "specache.eval.methods.snapkv:SnapKVMethod",
    "infllm": "specache.eval.methods.infllm:InfLLMMethod",
    "quest": "specache.eval.methods.quest:QuestMethod",
    "yakv": "specache.eval.methods.yakv:YAKVMethod",
}


def task_class(name: str) -> Any:
    """Return the class of the task `name`.

    Raises:
        ConfigError: no task has this name.
    """
    return named_class(TASKS, name, "task", _LISTED)


def method_class(name: str) -> Any:
    """Return the class of the method `name`.

    Raises:
        ConfigError: no method has this name.
    """
    return named_class(METHODS, name, "method", _LISTED)
