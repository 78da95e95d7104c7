"""Tiny tokenizers that wear the chat templates and markers of families with tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.server.tiny_server import TOKENIZER
from tests.templates.tokenizers import byte_level
from tests.tiny import llama

_CALL = "{% set f = c.function %}"
HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>"
    "Answer <tool_call> or text<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if not loop.previtem or loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if not loop.nextitem or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}" + _CALL + "{% if m.content or not loop.first %}\n{% endif %}"
    '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking_opened %}<think>\n{% endif %}{% endif %}"
)
HERMES_MARKERS = ("<pad>", "<|im_start|>", "<|im_end|>")
HERMES_WRITTEN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>'
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if tools and loop.first %}Functions:{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n\n{% endif %}"
    "{{ m.content | trim }}<|eot_id|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_MARKERS = (
    *("<pad>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
)

MISTRAL_LIST = (
    "<s>{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.tool_calls is defined and m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    + _CALL
    + "{% if c.id | length != 9 %}"
    "{{ raise_exception('nine characters') }}{% endif %}"
    '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}, "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}'
    "{% endfor %}]</s>"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
    '[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
MISTRAL_NAMED = (
    "<s>{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% for c in m.tool_calls or [] %}" + _CALL + "[TOOL_CALLS]{{ f.name }}[ARGS]"
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}{% endfor %}</s>"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
MISTRAL_MARKERS = (
    *("<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[ARGS]", "[CALL_ID]"),
)

HARMONY = (
    "{% if tools %}<|start|>developer<|message|>namespace functions {% for t in tools %}{% set f = t.function %}"
    "// {{ f.description }}\ntype {{ f.name }} = (_: {{ f.parameters | tojson }}) => any;\n{% endfor %}<|end|>{% endif %}"
    "{% set last = namespace(name='') %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if not last.name %}{{ raise_exception('no call') }}{% endif %}"
    "<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{% elif m.tool_calls %}{% if m.content and m.thinking %}{{ raise_exception('text and thinking') }}{% endif %}"
    "{% if m.content or m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.content or m.thinking }}<|end|>"
    "{% endif %}"
    "{% set f = m.tool_calls[0].function %}{% set last.name = f.name %}"
    "<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>{{ f.arguments | tojson }}<|call|>"
    "{% else %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY_MARKERS = (
    "<pad>",
    *("<|return|>", "<|call|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"),
)


@dataclass(frozen=True)
class Family:
    """A tokenizer with a family's markers, and how that family writes calls."""

    tokenizer: Any
    name: str

    def written(self, *calls: tuple[str, str], text: str = "") -> str:
        """Return an answer that makes these calls (name, JSON text), as the model writes it."""
        if self.name == "llama3":
            return text + "; ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in calls)
        if self.name == "mistral":
            objects = ", ".join(f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls)
            return f"{text}[TOOL_CALLS] [{objects}]"
        if self.name == "mistral_named":
            return text + "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
        if self.name == "harmony":
            lead = f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant" if text else ""
            (one,) = calls
            return f"{lead}<|channel|>commentary to=functions.{one[0]} <|constrain|>json<|message|>{one[1]}"
        blocks = [f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for name, arguments in calls]
        return text + "\n".join(blocks)


def families() -> dict[str, Family]:
    return {
        "hermes": Family(byte_level(HERMES, HERMES_MARKERS, "<|im_end|>", HERMES_WRITTEN), "hermes"),
        "llama3": Family(byte_level(LLAMA3, LLAMA3_MARKERS, "<|eot_id|>"), "llama3"),
        "mistral": Family(byte_level(MISTRAL_LIST, MISTRAL_MARKERS, "</s>"), "mistral"),
        "mistral_named": Family(byte_level(MISTRAL_NAMED, MISTRAL_MARKERS, "</s>"), "mistral_named"),
        "harmony": Family(byte_level(HARMONY, HARMONY_MARKERS, "<|return|>"), "harmony"),
        "generic": Family(TOKENIZER, "generic"),
    }


FAMILIES = families()


def seeded_model(tokenizer: Any, positions: int = 2048) -> Any:
    """Return a seeded model over a tokenizer's vocabulary."""
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=positions, eos_token_id=tokenizer.eos_token_id)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
