"""`compare`: questions that need every document of the prompt, after Loong (Wang et al., 2024)."""

from specache.eval.tasks.compare.task import Compare

__all__ = ["Compare"]
