"""Parsing answers into messages, in the syntax of each family of templates; invalid calls stay text."""

import pytest
from helpers import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from hf_clm.generation.parsing import AnswerReader, MessagePart, find_syntax
from hf_clm.generation.stream import TextStream
from hf_clm.schema import Json, Message

TOOLS: list[dict[str, Json]] = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
# Templates with the syntax of Qwen, QwQ, Mistral and Llama for reasoning and calls, and one without either.
HERMES = (
    "{% if tools %}<|im_start|>system{{ '\n' + (tools | tojson) }}<|im_end|>{{ '\n' }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}"
    "<|im_end|>{{ '\n' }}{% endfor %}" + OPENING
)
THINKS = HERMES.replace("assistant{{ '\n' }}", "assistant{{ '\n<think>\n' }}")
CALL = '{"name": "{{ call.function.name }}", "KEY": {{ call.function.arguments | tojson }}}'
MISTRAL = (
    "{{ tools | tojson }}{% for m in messages %}{% if m.tool_calls %}{{ '[TOOL_CALLS] [' }}"
    "{% for call in m.tool_calls %}" + CALL.replace("KEY", "arguments") + "{% endfor %}]"
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{{ '<|im_end|>' }}{% endfor %}"
)
LLAMA = (
    "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{% for call in m.tool_calls or [] %}" + CALL.replace("KEY", "parameters") + "{% endfor %}"
    "{{ m.content or '' }}<|im_end|>{% endfor %}" + OPENING
)
CHATML = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{% endfor %}" + OPENING


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(eos="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def reader_of(template: str, *, prompt: str = "", tools: list[dict[str, Json]] = TOOLS) -> AnswerReader:
    tokenizer = tokenizer_of(template)
    return AnswerReader(tokenizer, find_syntax(tokenizer), prompt=prompt, tools=tools)


def parse(template: str, answer: str, *, prompt: str = "", tools: list[dict[str, Json]] = TOOLS) -> Message:
    """Returns the message of an answer, without the random ids of its calls."""
    reader = reader_of(template, prompt=prompt, tools=tools)
    reader.feed(answer)
    reader.finish()
    message = reader.message
    for call in message.get("tool_calls", []):
        assert call.pop("id").startswith("call_")
    return message


def look(**arguments: Json) -> dict[str, Json]:
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


@pytest.mark.parametrize(
    ("template", "prompt", "answer", "message"),
    [
        (HERMES, "", " Hi \n", {"content": " Hi \n"}),
        (HERMES, "", "", {"content": ""}),
        (HERMES, "", "<think>\nEasy.\n</think>\n\nHi", {"content": "Hi", "reasoning": "Easy."}),
        (HERMES, "", "<think>\n\n</think>\n\nHi", {"content": "Hi"}),
        (HERMES, "", "Write <think> first.", {"content": "Write <think> first."}),
        (THINKS, "assistant\n<think>\n", "Easy.\n</think>\n\nHi", {"content": "Hi", "reasoning": "Easy."}),
        (THINKS, "assistant\n<think>\n", "Easy, but", {"content": "", "reasoning": "Easy, but"}),
        (THINKS, "<think>\n\n</think>\n\n", "Hi", {"content": "Hi"}),
        (
            HERMES,
            "",
            '<tool_call>\n{"name": "look", "arguments": {"at": "茶"}}\n</tool_call>',
            {"tool_calls": [look(at="茶")]},
        ),
        (
            THINKS,
            "assistant\n<think>\n",
            'Two.\n</think>\n\nI look.\n<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call>\n'
            '<tool_call>\n{"name": "look", "arguments": "{\\"at\\": 2}"}\n</tool_call>',
            {"content": "I look.", "reasoning": "Two.", "tool_calls": [look(at=1), look(at=2)]},
        ),
        (
            MISTRAL,
            "",
            '[TOOL_CALLS] [{"name": "look", "arguments": {}}, {"name": "look", "arguments": {"at": 2}}]',
            {"tool_calls": [look(), look(at=2)]},
        ),
        (LLAMA, "", '\n{"name": "look", "parameters": {"at": "me"}}', {"tool_calls": [look(at="me")]}),
    ],
)
def test_an_answer_becomes_a_message(template, prompt, answer, message):
    assert parse(template, answer, prompt=prompt) == {"role": "assistant", **message}


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (HERMES, 'Look: <tool_call>\n{"name": "look", "arguments": {"at"\n</tool_call> and more'),
        (HERMES, 'Look: <tool_call>\n{"name": "look", "argu'),
        (HERMES, '<tool_call>\n{"name": "look"}\n</tool_call>'),
        (HERMES, "<tool_call>\n<function=look>\n</function>\n</tool_call>"),
        (MISTRAL, "[TOOL_CALLS] []"),
        (LLAMA, '{"name": "Ann"}'),
        (LLAMA, 'A call: {"name": "look", "parameters": {}}'),
        (CHATML, '<think>x</think><tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'),
    ],
)
def test_invalid_calls_stay_text(template, answer):
    assert parse(template, answer) == {"role": "assistant", "content": answer}


def test_without_tools_calls_are_text():
    answer = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'

    assert parse(HERMES, answer, tools=[]) == {"role": "assistant", "content": answer}


def test_the_id_generated_by_the_model_is_kept():
    reader = reader_of(MISTRAL)
    reader.feed('[TOOL_CALLS] [{"name": "look", "arguments": {}, "id": "abcdefghi"}]')
    reader.finish()

    assert reader.tool_calls[0].get("id") == "abcdefghi"


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ('Hi<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call> you', ["H", "i", "you"]),
        ("Hi<tool_call> you", ["H", "i", "<tool_call> you"]),
        ("a <b\n<too", ["a", " <b", "\n<too"]),
    ],
)
def test_in_a_stream_a_potential_call_is_held_back(answer, parts):
    reader = reader_of(HERMES)

    result = [part for letter in answer for part in reader.feed(letter)] + reader.finish()

    assert [part.text for part in result] == parts
    assert {part.kind for part in result} == {"content"}


def test_in_a_stream_reasoning_is_separate():
    reader = reader_of(THINKS, prompt="assistant\n<think>\n")

    result = [part for piece in ("Ea", "sy", "\n</thi", "nk>", "\n\nH", "i") for part in reader.feed(piece)]

    assert result + reader.finish() == [
        MessagePart("reasoning", "Ea"),
        MessagePart("reasoning", "sy"),
        MessagePart("content", "H"),
        MessagePart("content", "i"),
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ('Hi @look{"at": 1}@', {"content": "Hi ", "tool_calls": [look(at=1)]}),
        ("Hi @look{at@ you", {"content": "Hi @look{at@ you"}),
    ],
)
def test_a_response_template_of_the_tokenizer_takes_precedence(answer, message):
    tokenizer = tokenizer_of(HERMES)
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "content": {},
            "tool_calls": {
                "open_pattern": r"@(?P<name>\w+)",
                "close": "@",
                "content": "json",
                "repeats": True,
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
        },
    }
    reader = AnswerReader(tokenizer, find_syntax(tokenizer), prompt="<|im_start|>assistant\n", tools=TOOLS)
    reader.feed(answer)
    reader.finish()

    for call in reader.tool_calls:
        call.pop("id")
    assert reader.message == {"role": "assistant", **message}


def test_marks_are_text_even_as_special_tokens():
    tokenizer = tokenizer_of(MISTRAL)
    tokenizer.add_special_tokens({"extra_special_tokens": ["[TOOL_CALLS]", "[INST]"]})
    ids = tokenizer.encode("[INST]a[TOOL_CALLS] b<|im_start|>", add_special_tokens=False)
    stream = TextStream(tokenizer, find_syntax(tokenizer).hidden_ids)

    assert [stream.push(token) for token in ids] == ["", "a", "[TOOL_CALLS]", " ", "b", ""]
