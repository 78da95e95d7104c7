"""A whole server in this process: a tiny model, its engine's thread, and the application."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from anthropic.types import ErrorResponse, ErrorType
from starlette.testclient import TestClient

from specache import SpeCacheConfig
from specache.engine.service import EngineService
from specache.server.app import ServerApp
from specache.server.keys import KeyRing
from specache.server.served_model import ServedModel
from specache.server.settings import ServerSettings
from tests.cli.tiny_chat import POSITIONS, SPECIAL, byte_tokenizer
from tests.tiny import llama

NAME = "tiny"
ADDRESS = "http://127.0.0.1:8000"
TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
KNOWN_TYPES = get_args(ErrorType)
SHORT = SpeCacheConfig(policy="on-demand", slow_tier="ram", residual=64, top_k=32)


def printable_model(positions: int = POSITIONS) -> Any:
    """Return a seeded model of bytes whose greedy answers are printable ASCII and never end."""
    model = llama(vocab_size=len(TOKENIZER), max_position_embeddings=positions, eos_token_id=END)
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = TOKENIZER.pad_token_id
    model.generation_config.do_sample = True  # as many models' files say; requests decide
    model.generation_config.temperature = 0.7
    model.generation_config.top_k = 20
    model.generation_config.repetition_penalty = 1.3
    printable = [TOKENIZER(chr(code))["input_ids"][0] for code in range(32, 127)]
    with torch.no_grad():
        others = torch.ones(len(TOKENIZER), dtype=torch.bool)
        others[printable] = False
        model.lm_head.weight[others] = 0
    return model


def held_model() -> tuple[Any, threading.Event]:
    """Return a model, and an event that each of its passes waits for. It is set at first."""
    model, going_on = printable_model(), threading.Event()
    going_on.set()

    def hold(*_: Any) -> None:
        going_on.wait(60)

    model.register_forward_hook(hold)
    return model, going_on


def served_model(model: Any, tokenizer: Any = TOKENIZER, names: tuple[str, ...] = (NAME,)) -> ServedModel:
    return ServedModel(model, tokenizer, names, model.config.max_position_embeddings, "specache-test")


@contextmanager
def running(
    model: Any = None,
    *,
    settings: ServerSettings | None = None,
    keys: dict[str, str] | None = None,
    config: SpeCacheConfig = SHORT,
    tokenizer: Any = TOKENIZER,
    names: tuple[str, ...] = (NAME,),
    **service: Any,
) -> Iterator[TestClient]:
    """Yield a client of a server, which ends with the block."""
    model = printable_model() if model is None else model
    app = ServerApp(settings or ServerSettings(), None if keys is None else KeyRing(keys))
    with EngineService(model, config, **service) as engine:
        assert engine.wait_until_ready(60)
        app.begin_serving(served_model(model, tokenizer, names), engine)
        with TestClient(app, base_url=ADDRESS) as client:
            yield client


def chat(client: TestClient, text: str = "Hello", code: int = 200, **fields: Any) -> Any:
    """Ask for an answer of 8 tokens, the likeliest ones unless the fields say otherwise."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}
    return post(client, "/v1/chat/completions", body, code)


def complete(client: TestClient, prompt: Any = "Hello", code: int = 200, **fields: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
    return post(client, "/v1/completions", body, code)


def post(client: TestClient, path: str, body: Any, code: int = 200) -> Any:
    """Post JSON and return the answer, or the error inside it."""
    response = client.post(path, json=body)
    assert response.status_code == code, response.text
    return response.json() if code == 200 else error_of(response)


def error_of(response: Any) -> dict[str, Any]:
    """Return the error of an answer, whose shape is that of the API whatever went wrong."""
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    request = response.request
    if "/v1/messages" in request.url.path or "anthropic-version" in request.headers:
        return anthropic_error_of(document, response.headers["request-id"])
    assert set(document) == {"error"}
    error = document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return error


def anthropic_error_of(document: Any, request_id: str) -> dict[str, Any]:
    """Return the error of a document in Anthropic's shape, as its client reads it."""
    parsed = ErrorResponse.model_validate(document, strict=True) if document["error"]["type"] in KNOWN_TYPES else None
    assert parsed is not None or document["error"]["type"] == "request_too_large"
    assert set(document) == {"type", "error", "request_id"} and document["type"] == "error"
    assert document["request_id"] == request_id and request_id.startswith("req_")
    assert set(document["error"]) == {"type", "message"} and document["error"]["message"]
    error: dict[str, Any] = document["error"]
    return error


def stream(client: TestClient, path: str, body: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """Return the chunks of a stream, without its `[DONE]`, and its comments."""
    chunks, comments = [], []
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    for line in lines:
        if line.startswith(":"):
            comments.append(line[1:].strip())
        else:
            assert line.startswith("data: ")
            chunks.append(line.removeprefix("data: "))
    if chunks and chunks[-1] == "[DONE]":
        chunks.pop()
    return [json.loads(chunk) for chunk in chunks], comments


def prompt_of(text: str) -> list[int]:
    """Return the tokens that the chat template makes of one message."""
    return [*TOKENIZER(f"<user>{text}<end><assistant>", add_special_tokens=False)["input_ids"]]


def token_of(character: str) -> int:
    return int(TOKENIZER(character)["input_ids"][0])


assert SPECIAL[END] == "<end>"
