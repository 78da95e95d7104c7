"""One answer as it grows: its text, its reasoning, its calls of tools, its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from specache.engine.events import Finished, NewToken
from specache.server.answer_pieces import AnswerPiece, ToolArguments, ToolCall, ToolCallBegin
from specache.server.generation import PreparedJob


@dataclass
class Choice:
    """An answer.

    Attributes:
        index: its place among the answers of the request.
        tokens: every new token, end tokens included.
        tool_calls: the calls of tools so far.
        reason: why it ended; `None` until then.
    """

    prepared: PreparedJob
    index: int
    tokens: list[NewToken] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    reason: str | None = None

    def __post_init__(self) -> None:
        self._answer = self.prepared.new_answer()

    @property
    def text(self) -> str:
        """Return the text so far; with reasoning, that of the final message."""
        return self._answer.text

    @property
    def reasoning(self) -> str | None:
        """Return the reasoning so far; `None` if there is none."""
        return self._answer.reasoning or None

    @property
    def stop(self) -> str | None:
        """Return the request's stop text that ended the answer; `None` if none did."""
        last = self.tokens[-1].token_id if self.tokens and self.reason == "stop" else None
        special = self.prepared.served.special_tokens
        found = self._answer.stop if self._answer.stop in self.prepared.stops else None
        return found or next((one for one in self.prepared.stops if special.get(one, -1) == last), None)

    def push(self, event: NewToken) -> list[AnswerPiece]:
        """Add a token and return the pieces that became final."""
        self.tokens.append(event)
        if event.token_id in self.prepared.end_ids or self._answer.ended:
            return []
        return self._noted(self._answer.push(event.token_id))

    def finish(self, reason: str) -> list[AnswerPiece]:
        """End the answer and return the pieces held back."""
        pieces = self._noted(self._answer.finish())
        self.reason = "tool_calls" if self.tool_calls and reason == "stop" else reason
        return pieces

    def _noted(self, pieces: list[AnswerPiece]) -> list[AnswerPiece]:
        for piece in pieces:
            if isinstance(piece, ToolCallBegin):
                self.tool_calls.append(ToolCall(piece.call_id, piece.name))
            elif isinstance(piece, ToolArguments):
                self.tool_calls[piece.index].arguments += piece.text
        return pieces


class Choices:
    """The answers of a request: `n` for each of its jobs, in order."""

    def __init__(self, jobs: list[PreparedJob], answers: int) -> None:
        self._answers = answers
        self.all = [Choice(job, number * answers + row) for number, job in enumerate(jobs) for row in range(answers)]
        self.cached_tokens = 0

    def of(self, job: int, row: int) -> Choice:
        """Return the answer of a row of a job."""
        return self.all[job * self._answers + row]

    def finish(self, job: int, event: Finished) -> list[tuple[Choice, list[AnswerPiece]]]:
        """End the answers of a job and return their pieces held back."""
        self.cached_tokens += event.facts.cached_tokens
        return [(choice, choice.finish(reason)) for row, reason in enumerate(event.reasons) for choice in [self.of(job, row)]]

    def usage(self, *, dropped: bool = False) -> dict[str, object]:
        """Return the tokens of the request, as OpenAI counts them.

        Args:
            dropped: the new tokens are not part of the answer.
        """
        prompt = sum(len(choice.prepared.prompt_ids) for choice in self.all[:: self._answers])
        new = 0 if dropped else sum(len(choice.tokens) for choice in self.all)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
