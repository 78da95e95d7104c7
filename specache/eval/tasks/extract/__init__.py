"""Structured extraction: all records of a document as a JSON list.

`schemas/` has the kinds of documents, `documents` generates them, `files` reads others, `prompt`
writes the prompt and `answers` the right JSON, `scoring` compares lists, `forced` compares
distributions along the right list, `task` is the task.
"""

from specache.eval.tasks.extract.task import Extract

__all__ = ["Extract"]
