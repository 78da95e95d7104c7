"""Fix the date that chat templates write: that of the conversation, not of each turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from specache.platform import forks

_ONE_AT_A_TIME = forks.lock()  # the module's name is the process's


@contextmanager
def fixed_date(date: datetime | None) -> Iterator[None]:
    """Make `strftime_now` of chat templates format `date` inside the block; None means the present.

    transformers defines that function over its module's `datetime`, and would replace a template
    variable of that name. So the module's `datetime` is replaced, by one thread at a time.
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

    with _ONE_AT_A_TIME:
        before = getattr(chat_template_utils, "datetime", None)
        if before is None:
            yield
            return
        chat_template_utils.datetime = Fixed
        try:
            yield
        finally:
            chat_template_utils.datetime = before
