"""`specache chat`: turns continue from the cache, and Ctrl-C stops an answer, not the program."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from specache import SpeCacheConfig, UsageError
from specache.cli.conversation import Conversation
from specache.cli.models import Dtype, LoadedModel, load
from specache.cli.options import GenerationOptions
from specache.cli.session_option import OpenedCache
from specache.templates.template import ChatTemplate
from tests.cli.running import one_line, run, run_json
from tests.cli.tiny_chat import POSITIONS, save_tiny_chat_model


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load(str(tiny_folder), dtype=Dtype.FLOAT32)


@pytest.fixture
def conversation(tiny: LoadedModel):
    config = SpeCacheConfig(policy="verified", slow_tier="ram", residual=64, top_k=512)
    conversation = Conversation(
        tiny, OpenedCache(tiny, config), GenerationOptions(max_new_tokens=10).arguments(), system="be brief"
    )
    yield conversation
    conversation.close()


def quiet(row: int, text: str) -> None:
    pass


def test_a_turn_continues_from_the_cache(conversation, tiny):
    conversation.say("first " * 20, quiet)
    held = conversation.cache.get_seq_length()
    conversation.say("second", quiet)
    whole = len(ChatTemplate(tiny.tokenizer).encode(conversation.messages[:-1]))
    assert conversation.cache.get_seq_length() > held
    assert whole - held < 40  # what the second turn had to read: the new message and the template around it
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_a_later_turn_is_answered_as_if_the_conversation_were_one_prompt(conversation, tiny):
    conversation.say("first " * 20, quiet)
    continued = conversation.say("second", quiet).results[0]
    opened = OpenedCache(tiny, SpeCacheConfig(policy="full"))
    fresh = Conversation(tiny, opened, GenerationOptions(max_new_tokens=10).arguments())
    fresh.messages = conversation.messages[:-2]
    assert fresh.say("second", quiet).results[0] == continued
    fresh.close()


def test_ctrl_c_keeps_the_answer_so_far(conversation):
    pieces: list[str] = []

    def interrupt(row: int, text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    outcome = conversation.say("tell me everything", interrupt)
    assert outcome.interrupted and outcome.results[0].finish_reason == "interrupted"
    assert conversation.messages[-1] == {"role": "assistant", "content": outcome.results[0].text}
    assert outcome.results[0].text.startswith("".join(pieces[:2]))
    assert not conversation.say("go on", quiet).interrupted


def test_a_message_that_is_too_long_is_forgotten(conversation):
    with pytest.raises(UsageError, match="positions"):
        conversation.say("x" * POSITIONS, quiet)
    assert [message["role"] for message in conversation.messages] == ["system"]
    assert conversation.say("short", quiet).results[0].token_ids


def test_reset_forgets_everything_but_the_system_message(conversation):
    conversation.say("hello", quiet)
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be brief"}]
    assert conversation.cache.get_seq_length() == 0


def test_chat_answers_runs_commands_and_exits(tiny_folder):
    chat = ("chat", "-m", tiny_folder, "-n", "8", "--dtype", "float32")
    too_long = "y" * (POSITIONS + 1)
    result = run(*chat, stdin=f"hello\n\n/stats\n{too_long}\n/dance\n/reset\nhello\n/exit\nnever read\n")
    answer = run_json("generate", "-m", tiny_folder, "-n", "8", "--dtype", "float32", "--prompt", "hello")["results"][0]["text"]
    assert result.stdout == f"{answer}\n" * 2
    errors = one_line(result.stderr)
    assert "fast memory" in errors and "error: The prompt has" in errors and "Starting over" in errors
    assert run(*chat, stdin="hello").stdout == f"{answer}\n"  # the end of input leaves too


def test_a_model_without_a_template_cannot_chat(tmp_path):
    save_tiny_chat_model(tmp_path, chat_template=False)
    assert "has no chat template" in one_line(run("chat", "-m", tmp_path, stdin="hello\n", code=2).stderr)


def test_a_real_models_second_turn_is_what_stock_answers_to_the_whole_conversation(demo_model):
    model, tokenizer = demo_model.model, demo_model.tokenizer
    messages, answers = [], []
    questions = ("My name is Roberta. Say hello.", "What is my name?")
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    chat = ("chat", "-m", "demo", "-n", "12", "--dtype", "float32")
    assert run(*chat, stdin="\n".join(questions) + "\n").stdout == "\n".join(answers) + "\n"
