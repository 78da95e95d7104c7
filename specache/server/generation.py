"""From the fields of a request to a job of the engine. Runs on worker threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from secrets import randbits

import torch
from transformers import EosTokenCriteria, LogitsProcessorList, StoppingCriteriaList

from specache.engine.answer_length import answer_limit
from specache.engine.constraints import ConstrainedTokens, ConstraintsComplete
from specache.engine.events import Job
from specache.engine.generate import make_request
from specache.engine.handle import Request
from specache.server.answer_parser import AnswerParser, ChatContext
from specache.server.chat_fields import ChatBody
from specache.server.completion_fields import CompletionBody
from specache.server.error_responses import ApiError
from specache.server.penalties import RepeatPenalties
from specache.server.sampling_fields import SamplingFields
from specache.server.served_model import ServedModel
from specache.server.settings import ServerSettings
from specache.server.stop_criterion import TextEnds
from specache.server.tool_grammar import answer_grammar
from specache.templates.final_message import final_message


@dataclass(frozen=True)
class PreparedJob:
    """A job, and what its answers are made from.

    Attributes:
        prompt_ids: the prompt's tokens.
        prompt_text: its text, if the request gave one.
        chat: of the prompt that a chat template wrote; `None` for a raw text.
        end_ids: tokens that end an answer.
        stops: the request's texts that end an answer.
        end_texts: those of the model's files.
    """

    job: Job
    served: ServedModel
    prompt_ids: list[int]
    prompt_text: str | None
    chat: ChatContext | None
    end_ids: frozenset[int]
    stops: tuple[str, ...]
    end_texts: tuple[str, ...]

    def new_answer(self) -> AnswerParser:
        """Return an empty answer."""
        return self.served.new_answer(self.chat, (*self.stops, *self.end_texts), self.prompt_ids)


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
        ids = self.chat_prompt(body)
        chat = ChatContext(ids, self._served.tool_format, body.tool_use)
        wanted = self._settings.default_new_tokens if body.wanted_tokens is None else body.wanted_tokens
        return [self._job(body, ids, "messages", wanted, body.logprobs_per_token, chat=chat)]

    def chat_prompt(self, body: ChatBody) -> list[int]:
        """Return the tokens of a conversation's prompt, tools included.

        Raises:
            ApiError, SpeCacheError: 400, or 404 for another model.
        """
        self._check(body)
        if len(body.messages) > self._settings.most_messages:
            raise ApiError(400, f"A conversation may have {self._settings.most_messages:,} messages.", param="messages")
        return self._served.encode_chat(body.messages, body.variables(), body.tool_use)

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
        if body.grammar_spec is not None and any(stop not in self._served.special_tokens for stop in body.stop or ()):
            raise ApiError(400, f"stop: the answer ends where {body.grammar_spec.param} says. Leave one of them out.", param="stop")

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
        chat: ChatContext | None = None,
    ) -> PreparedJob:
        if (body.min_tokens or 0) > wanted:
            message = f"min_tokens: it may not be above the longest answer, {wanted:,} tokens."
            raise ApiError(400, message, param="min_tokens", code="invalid_value")
        new_tokens = self._new_tokens(ids, param, wanted)
        served = self._served
        stops = tuple(body.stop or ())
        ends_elsewhere = body.ignore_eos or body.grammar_spec is not None  # the grammar says where the answer ends
        end_texts = () if ends_elsewhere else served.end_texts
        ends = [*stops, *end_texts, *(chat.tool_format.ends if chat is not None and chat.callable else ())]
        special = [served.special_tokens[end] for end in ends if end in served.special_tokens]
        end_ids = list(dict.fromkeys((*(served.text_end_ids if chat is None else served.chat_end_ids), *special)))
        stop_ids = [served.special_tokens[stop] for stop in stops if stop in served.special_tokens]
        ending = stop_ids if body.ignore_eos else end_ids

        def new_answer() -> AnswerParser:
            return served.new_answer(chat, (*stops, *end_texts), ids)

        grammar = self._grammar(body, ids, end_ids, chat)
        request = self._request(body, ids, new_tokens, end_ids, ending, new_answer, grammar)
        job = Job(
            request,
            owner=self._prefix_owner(body.session),
            cacheable=self._settings.prefix_sharing,
            top_logprobs=logprobs,
            prompt_logprobs=logprobs if echo else None,
            policy=body.policy,
            top_k=body.top_k_pairs,
        )
        return PreparedJob(job, served, ids, text, chat, frozenset(ending), stops, end_texts)

    def _new_tokens(self, ids: list[int], param: str, wanted: int) -> int:
        """Return the longest answer that the model's positions leave room for."""
        if not ids:
            raise ApiError(400, "The prompt has no tokens.", param=param, code="invalid_value")
        self._served.check_tokens(ids, param)
        most = min((limit for limit in (self._settings.most_prompt_tokens, self._served.positions) if limit), default=None)
        if most is not None and (len(ids) > most or len(ids) == self._served.positions):
            raise ApiError(
                400,
                f"The prompt is too long: {len(ids)} tokens > {most}, the answer's first token among them.",
                param=param,
                code="context_length_exceeded",
            )
        return answer_limit(wanted, self._served.positions, len(ids)).new_tokens

    def _grammar(
        self, body: SamplingFields, ids: list[int], end_ids: list[int], chat: ChatContext | None
    ) -> ConstrainedTokens | None:
        """Return the grammar of the answers to a prompt, ready to run; `None` if they are free."""
        found = answer_grammar(self._served, body)
        if found is None:
            return None
        spec, grammar = found
        final = final_message(self._served.tokenizer, ids) if chat is not None and spec.after_reasoning else None
        return grammar.processor(body.answers, len(ids), end_ids, final)

    def _request(
        self,
        body: SamplingFields,
        ids: list[int],
        new_tokens: int,
        end_ids: Sequence[int],
        ending: Sequence[int],
        new_answer: Callable[[], AnswerParser],
        grammar: ConstrainedTokens | None,
    ) -> Request:
        """Return the request of an answer.

        Args:
            end_ids: the tokens that end an answer.
            ending: those of them that end this one: with `ignore_eos`, what the client stops at.
        """
        served = self._served
        rows = torch.tensor([ids] * body.answers, device=served.model.device)
        criteria, processors = StoppingCriteriaList(), LogitsProcessorList()
        if new_answer().may_end:
            criteria.append(TextEnds(new_answer, body.answers, ending))
        if body.presence_penalty or body.frequency_penalty:
            processors.append(RepeatPenalties(len(ids), body.presence_penalty or 0.0, body.frequency_penalty or 0.0))
        if grammar is not None:  # last: what else changes the logits cannot allow what it forbids
            processors.append(grammar)
            criteria.append(ConstraintsComplete(grammar))
        arguments = body.arguments() | ({"eos_token_id": list(end_ids)} if end_ids else {})
        with served.making:
            request = make_request(
                served.model,
                rows,
                attention_mask=torch.ones_like(rows),
                seed=randbits(63) if body.seed is None else body.seed % 2**64,
                max_new_tokens=new_tokens,
                pad_token_id=served.pad_id,
                stop_strings=[],  # `TextEnds` looks for those of the model's files too
                stopping_criteria=criteria,
                logits_processor=processors,
                **arguments,
            )
        if body.ignore_eos:
            kept = [one for one in request.params.stopping_criteria if not hasattr(one, "eos_token_id")]
            request.params.stopping_criteria = StoppingCriteriaList([*kept, *([EosTokenCriteria(list(ending))] if ending else [])])
        return request

    def _prefix_owner(self, session: str | None) -> str:
        """Return whom stored prefixes of a request belong to: the key, or its session."""
        owner = "" if self._settings.share_prefixes else self._owner
        return owner if session is None else f"{owner}/{session}"
