"""From the fields of a request to a job of the engine. Runs on worker threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from secrets import randbits

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from specache.engine.answer_length import answer_limit
from specache.engine.events import Job
from specache.engine.generate import make_request
from specache.engine.handle import Request
from specache.server.chat_fields import ChatBody
from specache.server.completion_fields import CompletionBody
from specache.server.error_responses import ApiError
from specache.server.penalties import RepeatPenalties
from specache.server.sampling_fields import SamplingFields
from specache.server.served_model import ServedModel
from specache.server.settings import ServerSettings
from specache.server.stop_criterion import TextEnds
from specache.templates.answer_text import AnswerText


@dataclass(frozen=True)
class PreparedJob:
    """A job, and what its answers are made from.

    Attributes:
        prompt_ids: the prompt's tokens.
        prompt_text: its text, if the request gave one.
        is_chat: whether a chat template wrote the prompt.
        end_ids: tokens that end an answer.
    """

    job: Job
    served: ServedModel
    prompt_ids: list[int]
    prompt_text: str | None
    is_chat: bool
    end_ids: frozenset[int]
    stops: tuple[str, ...]

    def new_text(self) -> AnswerText:
        """Return an empty answer."""
        return self.served.new_text(self.prompt_ids if self.is_chat else None, self.stops)


class JobMaker:
    """Makes the jobs of one request.

    Args:
        owner: the name of the key that the request carries.
    """

    def __init__(self, served: ServedModel, settings: ServerSettings, owner: str) -> None:
        self._served = served
        self._settings = settings
        self._owner = owner

    def chat(self, body: ChatBody) -> list[PreparedJob]:
        """Return the job of a conversation.

        Raises:
            ApiError, SpeCacheError: 400.
        """
        self._check(body)
        if len(body.messages) > self._settings.most_messages:
            raise ApiError(400, f"A conversation may have {self._settings.most_messages:,} messages.", param="messages")
        ids = self._served.encode_chat(body.messages, body.variables())
        wanted = self._settings.default_new_tokens if body.wanted_tokens is None else body.wanted_tokens
        return [self._job(body, ids, "messages", wanted, body.logprobs_per_token, is_chat=True)]

    def completion(self, body: CompletionBody) -> list[PreparedJob]:
        """Return the jobs of a request's prompts, in their order.

        Raises:
            ApiError, SpeCacheError: 400.
        """
        self._check(body)
        if len(body.prompt) > self._settings.most_prompts:
            raise ApiError(400, f"A request may have {self._settings.most_prompts:,} prompts.", param="prompt")
        jobs = []
        for index, prompt in enumerate(body.prompt):
            param = "prompt" if len(body.prompt) == 1 else f"prompt[{index}]"
            ids = self._served.encode_text(prompt) if isinstance(prompt, str) else prompt
            text = prompt if isinstance(prompt, str) else None
            jobs.append(self._job(body, ids, param, body.wanted_tokens, body.logprobs, text=text, echo=bool(body.echo)))
        return jobs

    def _check(self, body: SamplingFields) -> None:
        self._served.check_name(body.model)
        if body.answers > self._settings.most_answers:
            raise ApiError(400, f"A request may have {self._settings.most_answers} answers (n) to a prompt.", param="n")
        self._served.check_tokens([int(token) for token in body.logit_bias or ()], "logit_bias")

    def _job(
        self,
        body: SamplingFields,
        ids: list[int],
        param: str,
        wanted: int,
        logprobs: int | None,
        *,
        text: str | None = None,
        echo: bool = False,
        is_chat: bool = False,
    ) -> PreparedJob:
        if (body.min_tokens or 0) > wanted:
            message = f"min_tokens: it may not be above the longest answer, {wanted:,} tokens."
            raise ApiError(400, message, param="min_tokens", code="invalid_value")
        new_tokens = self._new_tokens(ids, param, wanted)
        served = self._served
        stops = tuple(body.stop or ())
        special = [served.special_tokens[stop] for stop in stops if stop in served.special_tokens]
        end_ids = [*(served.chat_end_ids if is_chat else served.text_end_ids), *special]

        def new_text() -> AnswerText:
            return served.new_text(ids if is_chat else None, stops)

        request = self._request(body, ids, new_tokens, end_ids, new_text)
        job = Job(
            request,
            owner=self._prefix_owner(body.session),
            cacheable=self._settings.prefix_sharing,
            top_logprobs=logprobs,
            prompt_logprobs=logprobs if echo else None,
            policy=body.policy,
            top_k=body.top_k_pairs,
        )
        ends = frozenset() if body.ignore_eos else frozenset(end_ids)
        return PreparedJob(job, served, ids, text, is_chat, ends, stops)

    def _new_tokens(self, ids: list[int], param: str, wanted: int) -> int:
        """Return the longest answer that the model's positions leave room for."""
        if not ids:
            raise ApiError(400, "The prompt has no tokens.", param=param, code="invalid_value")
        self._served.check_tokens(ids, param)
        most = min((limit for limit in (self._settings.most_prompt_tokens, self._served.positions) if limit), default=None)
        if most is not None and (len(ids) > most or len(ids) == self._served.positions):
            raise ApiError(
                400,
                f"The prompt has {len(ids):,} tokens; this server takes {most:,}, the answer's first token among them.",
                param=param,
                code="context_length_exceeded",
            )
        return answer_limit(wanted, self._served.positions, len(ids)).new_tokens

    def _request(
        self, body: SamplingFields, ids: list[int], new_tokens: int, end_ids: Sequence[int], new_text: Callable[[], AnswerText]
    ) -> Request:
        served = self._served
        rows = torch.tensor([ids] * body.answers, device=served.model.device)
        criteria, processors = StoppingCriteriaList(), LogitsProcessorList()
        if body.stop or new_text().has_channels:
            criteria.append(TextEnds(new_text, body.answers, end_ids))
        if body.presence_penalty or body.frequency_penalty:
            processors.append(RepeatPenalties(len(ids), body.presence_penalty or 0.0, body.frequency_penalty or 0.0))
        arguments = body.arguments() | ({"eos_token_id": list(end_ids)} if end_ids else {})
        with served.making:
            request = make_request(
                served.model,
                rows,
                attention_mask=torch.ones_like(rows),
                seed=randbits(63) if body.seed is None else body.seed % 2**64,
                max_new_tokens=new_tokens,
                pad_token_id=served.pad_id,
                stopping_criteria=criteria,
                logits_processor=processors,
                **arguments,
            )
        if body.ignore_eos:
            kept = [one for one in request.params.stopping_criteria if not hasattr(one, "eos_token_id")]
            request.params.stopping_criteria = StoppingCriteriaList(kept)
        return request

    def _prefix_owner(self, session: str | None) -> str:
        """Return whom stored prefixes of a request belong to: the key, or its session."""
        owner = "" if self._settings.share_prefixes else self._owner
        return owner if session is None else f"{owner}/{session}"
