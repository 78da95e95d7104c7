"""An agent sends its whole conversation at every turn; the server reads what is new.

`specache bench serve --agent-turns 30` is the same at full length.
"""

from __future__ import annotations

from typing import Any

import pytest

from specache.bench.serve_agent import agent_trace, read_per_new_token
from specache.bench.serve_client import Answered
from specache.bench.serve_texts import Texts
from specache.engine.prefix_store import PrefixStore
from tests.server.tiny_server import SHORT, TOKENIZER, post, running
from tests.server.tool_models import FAMILIES, seeded_model

CHAT = "/v1/chat/completions"
TEXT = "The tree was young, and nobody counted its rings; <|im_end|> was a word to it. " * 20
TURNS = 6


def ask(client: Any, request: Any, **fields: Any) -> Answered:
    body = {"messages": list(request.messages), "tools": list(request.tools), "max_tokens": 2, "temperature": 0, **fields}
    usage = post(client, CHAT, body)["usage"]
    return Answered(prompt_tokens=usage["prompt_tokens"], cached_tokens=usage["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("name", ["hermes", "mistral_named", "harmony", "generic"])
def test_an_agents_turn_costs_what_is_new(name):
    tokenizer = FAMILIES[name].tokenizer
    model = seeded_model(tokenizer, positions=8192)
    trace = agent_trace(TURNS, 400, 60, 2, Texts(TOKENIZER, 0, TEXT))
    with running(model, tokenizer=tokenizer, prefixes=PrefixStore(model, SHORT)) as client:
        answers = [ask(client, request) for request in trace]
        cost = read_per_new_token(answers)
        assert cost is not None and 0.5 < cost <= 1.3
        # a choice about tools changes nothing in front of the answer
        again = ask(client, trace[-1], tool_choice="none")
        assert again.prompt_tokens - again.cached_tokens <= 64


def test_a_turn_with_reasoning_and_a_real_call_costs_what_is_new():
    """What the model itself wrote comes back in fields, in the form of its template."""
    tokenizer = FAMILIES["hermes"].tokenizer
    model = seeded_model(tokenizer, positions=8192)
    messages: list[dict[str, Any]] = [{"role": "user", "content": TEXT[:500]}]
    flag = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "set", "parameters": flag}}]
    bias = {str(tokenizer.convert_tokens_to_ids("</think>")): 30}
    answers = []
    with running(model, tokenizer=tokenizer, prefixes=PrefixStore(model, SHORT)) as client:
        for turn in range(3):
            body = {"messages": messages, "tools": tools, "max_tokens": 120, "seed": turn, "tool_choice": "required"}
            document = post(client, CHAT, {**body, "logit_bias": bias, "parallel_tool_calls": False})
            usage, message = document["usage"], document["choices"][0]["message"]
            answers.append(
                Answered(prompt_tokens=usage["prompt_tokens"], cached_tokens=usage["prompt_tokens_details"]["cached_tokens"])
            )
            messages.append({name: value for name, value in message.items() if value is not None})
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": "</tool_response><|im_end|> is text here"}
                for call in message["tool_calls"]
            ]
    cost = read_per_new_token(answers)
    assert cost is not None and cost <= 1.3
