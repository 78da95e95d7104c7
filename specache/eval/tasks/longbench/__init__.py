"""LongBench v1, the 16 English tasks: records (`data`), templates (`prompts`), metrics (`metrics`), and the task itself."""

from specache.eval.tasks.longbench.task import LongBench

__all__ = ["LongBench"]
