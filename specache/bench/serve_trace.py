"""Traces: which requests arrive when, with which shared prefixes, prompts and answer lengths."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specache.bench.serve_texts import Texts
from specache.errors import BenchmarkError, ConfigError
from specache.platform.text_files import read_text

Message = dict[str, Any]  # of the API: `role`, `content`, and those of calls
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        at_s: when it arrives, in seconds after the first.
        messages: the conversation to answer.
        answer_tokens: most tokens of the answer.
        tools: that the model may call, in the API's form.
    """

    at_s: float
    messages: tuple[Message, ...]
    answer_tokens: int
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def text(self) -> str:
        """Return what a chat template writes of it, in about as many tokens."""
        contents = "".join(message["content"] or "" for message in self.messages)
        calls = [message["tool_calls"] for message in self.messages if "tool_calls" in message]
        return contents + (json.dumps([self.tools, calls]) if self.tools else "")


@dataclass(frozen=True)
class Sizes:
    """A generated trace.

    Attributes:
        requests: how many there are.
        rate: arrivals per second on average (a Poisson process); 0 has all arrive at once.
        prefixes: documents that requests share, taken in turn; 0 shares nothing.
        prefix_tokens, prompt_tokens: length of a document, and of a request's own text behind it.
        answer_tokens: most tokens of an answer.
    """

    requests: int
    rate: float
    prefixes: int
    prefix_tokens: int
    prompt_tokens: int
    answer_tokens: int


def generated(sizes: Sizes, texts: Texts, seed: int) -> list[TraceRequest]:
    """Return a trace of these sizes. The same seed and texts give the same trace."""
    arrivals = list(poisson(sizes.requests, sizes.rate, seed))
    names = [str(index % sizes.prefixes) if sizes.prefixes else None for index in range(sizes.requests)]
    return [
        TraceRequest(at, _question(texts, name, sizes.prefix_tokens, index, sizes.prompt_tokens), sizes.answer_tokens)
        for index, (at, name) in enumerate(zip(arrivals, names, strict=True))
    ]


def poisson(count: int, rate: float, seed: int) -> Iterator[float]:
    """Yield `count` arrival times of a Poisson process, in seconds, the first one 0.

    Args:
        rate: arrivals per second; 0 yields only zeros.
    """
    chance, at = random.Random(f"arrivals {seed}"), 0.0
    for index in range(count):
        if index and rate:
            at += chance.expovariate(rate)
        yield at


def read_trace(path: Path, texts: Texts, *, requests: int, rate: float, answer_tokens: int, seed: int) -> list[TraceRequest]:
    """Read a trace from a file.

    A `.json` file is ShareGPT's form: a list of conversations. Every answer in it is a request for
    the messages before it, at most as long as it is there, in the order of the file, arriving at
    `rate`. Any other file has a JSON object per line with `at_s`, `prompt_tokens`, `answer_tokens`,
    and optionally `prefix` (a name) and `prefix_tokens`, or `messages` in place of lengths.

    Args:
        requests: read at most so many.
        answer_tokens: longest answer of a ShareGPT file.

    Raises:
        BenchmarkError: the file cannot be read or is malformed. The message says where.
    """
    text = read_text(path, BenchmarkError)
    if path.suffix.lower() == ".json":
        conversations = list(_sharegpt(_parsed(text, str(path)), str(path)))[:requests]
        times = poisson(len(conversations), rate, seed)
        trace = [
            TraceRequest(at, messages, max(1, min(answer_tokens, texts.length(answer))))
            for at, (messages, answer) in zip(times, conversations, strict=True)
        ]
    else:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()][:requests]
        trace = [_of_line(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}", texts) for number, line in lines]
    if not trace:
        raise BenchmarkError(f"--trace {path} has no requests.")
    return sorted(trace, key=lambda request: request.at_s)


def _question(texts: Texts, prefix: str | None, prefix_tokens: int, index: int, prompt_tokens: int) -> tuple[Message, ...]:
    """Return a message: the shared document, if there is one, and the request's own text."""
    own = texts.passage(f"prompt {index}", prompt_tokens)
    document = "" if prefix is None else texts.passage(f"prefix {prefix}", prefix_tokens) + "\n\n"
    return ({"role": "user", "content": f"{document}{own}"},)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"--trace {where}: not JSON ({error.msg} at column {error.colno}).") from None


def _of_line(entry: Any, where: str, texts: Texts) -> TraceRequest:
    """Return the request of one line. Its prompt depends on the seed and the line's number."""
    if not isinstance(entry, dict):
        raise BenchmarkError(f"--trace {where}: expected a JSON object, got {type(entry).__name__}.")
    at_s, answer_tokens = _number(entry, "at_s", where), int(_number(entry, "answer_tokens", where))
    if "messages" in entry:
        messages = _messages(entry["messages"], where)
    else:
        prefix, number = entry.get("prefix"), int(where.rpartition(" ")[2])
        prefix_tokens = 0 if prefix is None else int(_number(entry, "prefix_tokens", where))
        prompt_tokens = int(_number(entry, "prompt_tokens", where))
        messages = _question(texts, None if prefix is None else str(prefix), prefix_tokens, number, prompt_tokens)
    return TraceRequest(at_s, messages, max(1, answer_tokens))


def _number(entry: dict[str, Any], name: str, where: str) -> float:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise BenchmarkError(f"--trace {where}: {name!r} must be a number of at least 0, got {value!r}.")
    return float(value)


def _messages(entries: Any, where: str) -> tuple[Message, ...]:
    messages = tuple(entries) if isinstance(entries, list) else ()
    for one in messages or (entries,):
        if not isinstance(one, dict) or not isinstance(one.get("content"), str) or one.get("role") not in _ROLES.values():
            raise BenchmarkError(
                f"--trace {where}: 'messages' is a list of objects with 'role' (system, user, assistant) and 'content' (text), "
                f"got {str(one)[:100]}."
            )
    return tuple({"role": one["role"], "content": one["content"]} for one in messages)


def _sharegpt(document: Any, where: str) -> Iterator[tuple[tuple[Message, ...], str]]:
    """Yield the messages before every answer, and the answer."""
    if not isinstance(document, list):
        raise BenchmarkError(f"--trace {where}: ShareGPT's form is a list of conversations, got {type(document).__name__}.")
    for index, entry in enumerate(document):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise BenchmarkError(f"--trace {where}: entry {index} has no list 'conversations'.")
        yield from _answers(turns, f"{where}: entry {index}")


def _answers(turns: Sequence[Any], where: str) -> Iterator[tuple[tuple[Message, ...], str]]:
    before: list[Message] = []
    for turn in turns:
        role = _ROLES.get(turn.get("from", "")) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise BenchmarkError(f"--trace {where}: a turn has 'from' ({', '.join(_ROLES)}) and 'value', got {str(turn)[:100]}.")
        if role == "assistant" and before and before[-1]["role"] == "user":
            yield tuple(before), turn["value"]
        before.append({"role": role, "content": turn["value"]})


def check_fits(trace: Sequence[TraceRequest], texts: Texts, positions: int | None) -> int:
    """Return the tokens of the longest prompt with its answer, without a chat template's.

    Args:
        positions: of the model; `None` for no limit.

    Raises:
        ConfigError: the model has fewer positions.
    """
    needed = [texts.length(request.text) + request.answer_tokens for request in trace]
    longest = max(needed)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"request {needed.index(longest)} of the trace needs {longest:,} tokens with its answer, but the model has "
            f"{positions:,} positions. Choose smaller --prefix-tokens, --prompt-tokens and --answer-tokens, or another trace."
        )
    return longest
