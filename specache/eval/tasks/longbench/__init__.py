"""LongBench v1, the 16 English tasks.

`data` reads records, `prompt_texts` has the templates, `metrics` the scores, `task` the task.
"""

from specache.eval.tasks.longbench.task import LongBench

__all__ = ["LongBench"]
