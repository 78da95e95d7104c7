"""Structured extraction: all records of a document as a JSON list.

`schemas/` has the kinds of documents, `draft` generates them, `folder` reads others, `prompt`
writes the prompt and `answers` the right JSON, `list_scores` compares lists, `forced` compares
distributions along the right list, `task` is the task.
"""

from specache.eval.tasks.extract.task import Extract

__all__ = ["Extract"]
