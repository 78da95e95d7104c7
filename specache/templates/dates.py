"""The date that chat templates write: that of the conversation, not that of each of its turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any


@contextmanager
def fixed_date(date: datetime | None) -> Iterator[None]:
    """Inside, `strftime_now` of chat templates formats `date`, or the present if there is none.

    transformers defines that function itself, over the `datetime` of its module, and would replace one that is passed as a
    template variable by the name of its type. So it is the `datetime` of that module that is replaced.
    """
    if date is None:
        yield
        return
    now = date
    from transformers.utils import chat_template_utils

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return now if tz is None else now.astimezone(tz)

    before = getattr(chat_template_utils, "datetime", None)
    if before is None:
        yield
        return
    chat_template_utils.datetime = Fixed
    try:
        yield
    finally:
        chat_template_utils.datetime = before
