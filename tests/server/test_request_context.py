"""What belongs to a request ends with it, whatever fails."""

from __future__ import annotations

from specache.server.request_context import RequestContext


def test_everything_ends_although_one_end_fails(caplog):
    context, ended = RequestContext(), []
    context.at_end(lambda: ended.append("stream"))
    context.at_end(lambda: 1 // 0)
    context.at_end(lambda: ended.append("ticket"))
    context.end()
    assert ended == ["ticket", "stream"] and "the end of a request failed" in caplog.text
    context.at_end(lambda: ended.append("late"))
    assert ended[-1] == "late"
