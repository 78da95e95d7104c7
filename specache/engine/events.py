"""What a service is asked for (`Job`), and what it reports about it (the events)."""

from __future__ import annotations

from dataclasses import dataclass

from specache.config import Policy
from specache.engine.handle import Request


@dataclass(frozen=True)
class Job:
    """A request for an `EngineService`, with what concerns serving it.

    Attributes:
        request: made by `specache.make_request`. The service takes over its `progress` and chunk.
        owner: whom stored prefixes belong to. Requests never share prefixes with another owner.
        cacheable: whether what is read and written may be kept as a prefix for later requests.
        top_logprobs: how many most likely tokens to report beside each new one; 0 reports the
            log-probability of the new token alone, `None` nothing.
        prompt_logprobs: the same of every prompt token. The prompt is then read in full.
        policy, top_k: settings of this request, in place of the configuration's. `top_k` holds at
            every length.
        deadline: the `time.monotonic()` at which the request ends as `aborted`.
    """

    request: Request
    owner: str = ""
    cacheable: bool = True
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    policy: Policy | None = None
    top_k: int | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Facts:
    """What a request needed, up to its end.

    Attributes:
        prompt_tokens: tokens of all distinct prompts; `cached_tokens` of them were stored before.
        new_tokens: new tokens of all rows.
        fast_bytes, slow_bytes: the cache's bytes of the request at its end, in fast and in slow
            memory. What it shares with others counts in full.
        ordinary_bytes: the bytes of an ordinary 16-bit cache of the same tokens.
        hit_rate: share of the selected 16-bit pairs that were ready when needed, of all requests
            that ran meanwhile; `None` where nothing is fetched ahead.
        waited_s, prefill_s, decode_s: seconds in the queue, from there to the first token, and from
            there to the end.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    fast_bytes: int = 0
    slow_bytes: int = 0
    ordinary_bytes: int = 0
    hit_rate: float | None = None
    waited_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Started:
    """The request left the queue: `cached_tokens` of its prompts are stored, the rest is read."""

    cached_tokens: int


@dataclass(frozen=True)
class PromptProgress:
    """`done` of `total` prompt tokens are read."""

    done: int
    total: int


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token in front of its logits processors.

    Attributes:
        logprob: natural logarithm; `None` for the first token of a prompt, which nothing predicts.
        top: the most likely tokens as (token, log-probability), most likely first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of prompt tokens `start`, `start + 1`, ... of a row's prompt."""

    row: int
    start: int
    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class NewToken:
    """A new token of a row; `logprob` and `top` as `Job.top_logprobs` asks."""

    row: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The request's end, also an abort: per row `stop`, `length` or `aborted`. The last event."""

    reasons: tuple[str, ...]
    facts: Facts


@dataclass(frozen=True)
class Failed:
    """The error that ended the request. The last event."""

    error: BaseException


Event = Started | PromptProgress | PromptLogprobs | NewToken | Finished | Failed
