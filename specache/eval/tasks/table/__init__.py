"""`table`: an HTML page to tab-separated values, after LongProc (Ye et al., 2025)."""

from specache.eval.tasks.table.task import Table

__all__ = ["Table"]
