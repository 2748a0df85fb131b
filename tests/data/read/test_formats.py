"""Converting records to examples, by format, and the messages for invalid records."""

import json
import sys
from typing import Any, cast

import numpy as np
import pandas
import pytest
from helpers import X, byte_tokenizer

from hf_clm.data.label.labels import tokens_to_rows
from hf_clm.data.read.formats import (
    FORMATS,
    check_same_masks,
    check_same_schema,
    detect_format,
    to_example,
    to_prompt,
    unknown_keys,
)
from hf_clm.errors import DataError, RecipeError
from hf_clm.schema import AnyExample, Chat, Document, Format, Message, Segment, Tokens

USER: Message = {"role": "user", "content": "2+2?"}
ASSISTANT: Message = {"role": "assistant", "content": "4"}
SYSTEM: Message = {"role": "system", "content": "Be brief."}
ROLES = "use one of system, user, assistant, tool"
PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
WEATHER_TOOL = {"type": "function", "function": WEATHER}
BERLIN = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Berlin"}}}


ASKS, SAYS = {"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}


def T(text: str, weight: float = 1.0) -> Segment:
    return Segment(text, weight)


def R(text: str) -> Segment:
    return Segment(text, 0.0)


def pair(prompt: str, completion: str) -> Document:
    return Document([R(prompt), T(completion)])


def said(**more: Any) -> dict[str, Any]:
    """Returns an assistant turn with additional keys."""
    return {**ASSISTANT, **more}


def called(*calls: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(calls), **more}


def chat_of(*turns: Any, **more: Any) -> Chat:
    return cast(Chat, to_example({"messages": list(turns), **more}, format="messages"))


def last_of(*turns: Any) -> Message:
    return chat_of(USER, *turns).messages[-1]


def refusal(record: Any, format: Any, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        to_example(record, format=format, where="f.jsonl:7", **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("format", "record", "example"),
    [
        ("text", {"text": " a\n"}, Document([T(" a\n")])),
        ("prompt_completion", {"prompt": "a ", "completion": " b"}, pair("a ", " b")),
        ("instruct", {"instruct": "Go:", "input": "a\nb", "label": "c"}, pair("Go:a\nb", "c")),
        ("instruct", {"instruct": "Go:", "input": " ", "label": "c"}, pair("Go:", "c")),
        ("instruct", {"instruct": "Go:", "input": None, "label": "c"}, pair("Go:", "c")),
        ("instruct", {"instruct": "Go:", "label": "c"}, pair("Go:", "c")),
        ("alpaca", {"instruction": "Add.", "input": "1 {2}", "output": "3"},
         pair(PREAMBLE_WITH_INPUT + "### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n", "3")),
        ("alpaca", {"instruction": "Add.", "input": "", "output": "3"},
         pair(PREAMBLE + "### Instruction:\nAdd.\n\n### Response:\n", "3")),
        ("alpaca", {"system": "Be brief.", "instruction": "Add.", "output": "3"},
         pair("Be brief.\n\n### Instruction:\nAdd.\n\n### Response:\n", "3")),
        ("messages", {"messages": [SYSTEM, USER, ASSISTANT]}, Chat([SYSTEM, USER, ASSISTANT])),
        ("messages", {"system": "Be brief.", "messages": [USER, ASSISTANT]}, Chat([SYSTEM, USER, ASSISTANT])),
        ("sharegpt", {"system": "Be brief.", "conversations": [ASKS, SAYS]}, Chat([SYSTEM, USER, ASSISTANT])),
        ("sharegpt",
         {"conversations": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
         Chat([USER, ASSISTANT])),
        ("segments", {"segments": [{"text": "a", "train": False}, {"text": " b", "train": True}]},
         Document([R("a"), T(" b")])),
        ("tokenized", {"input_ids": [5, 0, 7]}, Tokens([5, 0, 7], [5, 0, 7], [3])),
        ("tokenized", {"input_ids": [5, 7], "labels": [-100, 7]}, Tokens([5, 7], [-100, 7], [2])),
    ],
)  # fmt: skip
def test_every_format_gives_its_example(format, record, example):
    assert to_example(record, format=format) == example
    assert detect_format(record) == format


@pytest.mark.parametrize(
    ("format", "record", "messages"),
    [
        ("prompt_completion", {"prompt": "2+2?", "completion": "4"}, [USER, ASSISTANT]),
        ("instruct", {"instruct": "Add.", "input": "1, 2", "label": "3"},
         [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}]),
        ("instruct", {"instruct": "2+2?", "label": "4"}, [USER, ASSISTANT]),
        ("alpaca",
         {"system": "Be brief.", "history": [["2+2?", "4"]], "instruction": "And 3+3?", "output": "6"},
         [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "And 3+3?"}, said(content="6")]),
        ("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3"},
         [{"role": "user", "content": "Add.\n\n1, 2"}, said(content="3")]),
        ("alpaca", {"instruction": "2+2?", "history": [], "output": "4"}, [USER, ASSISTANT]),
        ("alpaca", {"instruction": "2+2?", "history": None, "output": "4"}, [USER, ASSISTANT]),
    ],
)  # fmt: skip
def test_prompt_and_completion_become_turns_with_a_chat_template(format, record, messages):
    assert to_example(record, format=format, render="chat") == Chat(messages)


@pytest.mark.parametrize("render", ["chat", "plain"])
def test_prompt_and_completion_as_messages_become_one_chat(render):
    """TRL's conversational form: assistant turns in the prompt are not targets."""
    more = {"role": "user", "content": "And 3+3?"}
    record = {"prompt": [SYSTEM, USER, ASSISTANT, more], "completion": [{**ASSISTANT, "content": "6"}]}

    assert to_example(record, format="prompt_completion", render=render) == Chat(
        [SYSTEM, USER, {**ASSISTANT, "weight": 0.0}, more, {"role": "assistant", "content": "6"}]
    )
    assert to_prompt({"prompt": [SYSTEM, USER]}, format="prompt_completion") == Chat([SYSTEM, USER])


# --- the keys of a message


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({}, 1),
        ({"train": True}, 1),
        ({"train": False}, 0),
        ({"training": True}, 1),
        ({"training": False}, 0),
        ({"loss": True}, 1),
        ({"loss": False}, 0),
        ({"loss": 0}, 0),
        ({"loss": 0.5}, 0.5),
        ({"masked": False}, 1),
        ({"masked": True}, 0),
        ({"weight": 0}, 0),
        ({"weight": 0.25}, 0.25),
        ({"weight": 1}, 1),
        ({"loss_weight": 0}, 0),
        ({"loss_weight": 2}, 2),
        ({"weight": 0.5, "loss_weight": 0.5}, 0.25),
        ({"train": True, "weight": 0.5}, 0.5),
        ({"train": False, "weight": 2}, 0),
        ({"train": None, "training": None, "loss": None, "masked": None, "weight": None}, 1),
    ],
)  # fmt: skip
def test_every_name_of_a_turns_weight_is_supported(keys, weight):
    assert last_of(said(**keys)).get("weight", 1) == weight


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"trian": False}, "unknown key 'trian'; did you mean 'train'?; fix: allowed keys are role, "),
        ({"wieght": 0}, "unknown key 'wieght'; did you mean 'weight'?"),
        ({"reasoning_contents": "a"}, "unknown key 'reasoning_contents'; did you mean 'reasoning_content'?"),
        ({"emotion": "calm"}, "unknown key 'emotion'; fix: allowed keys are role, content, "),
        ({"train": 0}, "'train': expected true or false; got 0"),
        ({"training": "no"}, "'training': expected true or false; got 'no'"),
        ({"masked": 1}, "'masked': expected true or false; got 1"),
        ({"weight": -1}, "'weight': expected a number of at least 0; got -1"),
        ({"loss_weight": "2"}, "'loss_weight': expected a number of at least 0; got '2'"),
        ({"loss": "no"}, "'loss': expected a number of at least 0; got 'no'"),
    ],
)  # fmt: skip
def test_a_key_that_could_affect_the_labels_is_never_ignored(keys, message):
    text = refusal({"messages": [USER, said(**keys)]}, "messages", strict=False)

    assert text.startswith(f"f.jsonl:7: message 2: {message}")


@pytest.mark.parametrize("key", ["train", "training", "loss"])
def test_a_user_turn_cannot_be_a_target(key):
    text = refusal({"messages": [{**USER, key: True}, ASSISTANT]}, "messages")

    assert text.startswith(f"f.jsonl:7: message 1: {key!r} on a turn of role 'user'; fix: only assistant")
    for off in ({"train": False}, {"masked": True}, {"weight": 0}):
        assert chat_of({**USER, **off}, ASSISTANT) == Chat([USER, ASSISTANT])


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_read_under_each_of_its_names(key):
    thought: Message = {"role": "assistant", "content": "4", "reasoning": "two and two"}

    assert last_of(said(**{key: "two and two"})) == thought
    assert last_of(said(**{key: "two and two", "reasoning": "two and two"})) == thought
    assert last_of(said(**{key: " "})) == last_of(said(**{key: None})) == ASSISTANT


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([USER, said(reasoning="a", thinking="b")], "message 2: 'reasoning', 'thinking' differ; fix: keep"),
        ([USER, said(thinking=["a"])], "message 2: thinking: expected str; got list"),
        ([{**USER, "reasoning": "a"}, ASSISTANT], "message 1: reasoning on a turn of role 'user'"),
    ],
)  # fmt: skip
def test_ambiguous_reasoning_is_refused(turns, message):
    assert refusal({"messages": turns}, "messages").startswith(f"f.jsonl:7: {message}")


# --- tools


@pytest.mark.parametrize(
    "tools",
    [
        [WEATHER_TOOL],
        [WEATHER],
        json.dumps([WEATHER_TOOL]),
        [{**WEATHER_TOOL, "strict": None, "function": {**WEATHER, "description": None}}],
    ],
    ids=["list", "bare functions", "JSON text", "nulls of a table"],
)  # fmt: skip
@pytest.mark.parametrize("format", ["messages", "sharegpt", "prompt_completion"])
def test_tools_are_read_in_each_of_their_forms(tools, format):
    records: Any = {
        "messages": {"messages": [USER, ASSISTANT]},
        "sharegpt": {"conversations": [ASKS, SAYS]},
        "prompt_completion": {"prompt": "2+2?", "completion": "4"},
    }
    record = {**records[format], "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}

    assert to_example(record, format=format, render="chat") == Chat(
        [USER, ASSISTANT], [WEATHER_TOOL], {"enable_thinking": False}
    )


@pytest.mark.parametrize("empty", [None, [], "", "[]"])
def test_a_chat_without_tools_has_none(empty):
    assert chat_of(USER, ASSISTANT, tools=empty) == Chat([USER, ASSISTANT])


@pytest.mark.parametrize(
    ("turn", "calls"),
    [
        (called(BERLIN), [BERLIN]),
        (called(BERLIN, content=None), [BERLIN]),
        (called(BERLIN["function"]), [BERLIN]),
        (called({"name": "weather", "parameters": {"city": "Berlin"}}), [BERLIN]),
        (called({**BERLIN, "id": "call_1", "index": 0}), [{**BERLIN, "id": "call_1"}]),
        ({"role": "assistant", "tool_calls": json.dumps([BERLIN])}, [BERLIN]),
        ({"role": "assistant", "function_call": BERLIN["function"]}, [BERLIN]),
        (called({"function": {"name": "weather", "arguments": '{"city": "Berlin"}'}}),
         [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Berlin"}'}}]),
        (called({"function": {"name": "now", "arguments": None}}),
         [{"type": "function", "function": {"name": "now", "arguments": {}}}]),
    ],
)  # fmt: skip
def test_tool_calls_are_read_in_each_of_their_forms(turn, calls):
    assert last_of(turn) == {"role": "assistant", "tool_calls": calls}


def test_a_chat_may_have_a_call_with_text_and_its_result():
    result = {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": {"t": 21}}
    older = {"role": "function", "name": "weather", "content": ""}

    chat = chat_of(USER, called(BERLIN, content="I look."), result, older, ASSISTANT)

    assert chat.messages[1:4] == [
        {"role": "assistant", "content": "I look.", "tool_calls": [BERLIN]},
        {"role": "tool", "content": '{"t": 21}', "name": "weather", "tool_call_id": "call_1"},
        {"role": "tool", "content": "", "name": "weather"},
    ]


@pytest.mark.parametrize(
    "value",
    ['{"name": "weather", "arguments": {"city": "Berlin"}}', json.dumps([BERLIN]), BERLIN],
)
def test_a_sharegpt_chat_may_have_function_calls_and_observations(value):
    """LLaMA-Factory's format; its ``tools`` are JSON text."""
    record = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": value},
            {"from": "observation", "value": '{"t": 21}'},
            {"from": "gpt", "value": "21 degrees", "weight": 0},
            ASKS,
            {**SAYS, "loss": True},
        ],
        "tools": json.dumps([WEATHER]),
    }

    assert to_example(record, format="sharegpt") == Chat(
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "tool_calls": cast(Any, [BERLIN])},
            {"role": "tool", "content": '{"t": 21}'},
            {"role": "assistant", "content": "21 degrees", "weight": 0.0},
            USER,
            ASSISTANT,
        ],
        [WEATHER_TOOL],
    )


# --- the shape of a record


@pytest.mark.parametrize(
    ("format", "record", "message"),
    [
        (
            "prompt_completion",
            {"prompt": "a", "completon": "b"},
            "missing key 'completion'; got keys 'prompt', 'completon'; did you mean 'completon'?; "
            "fix: add it, or set its column with fields: {completion: COLUMN}",
        ),
        ("text", {}, "missing key 'text'; got keys none; fix: add it, or set its column with fields:"),
        ("text", {"text": None}, "key 'text' is null; fix: fill it in, or remove the record"),
        ("text", {"text": 5}, "key 'text': expected str; got int"),
        ("text", {"text": " \n"}, "key 'text' is empty; got ' \\n'; fix: fill it in, or remove the record"),
        ("text", [1], "record: expected object; got list"),
        ("prompt_completion", {"prompt": 5, "completion": "b"}, "key 'prompt': expected str; got int"),
        ("prompt_completion", {"prompt": {}, "completion": "b"}, "key 'prompt': expected str; got object"),
        ("prompt_completion", {"prompt": ["a"], "completion": "b"}, "message 1: expected object; got str"),
        ("prompt_completion", {"prompt": [USER], "completion": "b"}, "key 'completion': expected list; got"),
        ("prompt_completion", {"prompt": "a", "completion": [USER]}, "key 'completion': expected str; got"),
        ("prompt_completion", {"prompt": "a", "completion": True}, "key 'completion': expected str; got"),
        ("prompt_completion", {"prompt": "", "completion": "b"}, "key 'prompt' is empty; got ''"),
        ("prompt_completion", {"prompt": "a", "completion": "\t "}, "key 'completion' is empty; got '\\t '"),
        ("prompt_completion", {"prompt": "a", "completion": "b", "tools": [WEATHER]},
         "key 'tools' needs chat turns, but the prompt is plain text"),
        ("instruct", {"instruct": "a", "label": None}, "key 'label' is null"),
        ("instruct", {"instruct": "a", "label": "b", "input": 5}, "key 'input': expected str; got int"),
        ("alpaca", {"instruction": "a", "output": " "}, "key 'output' is empty; got ' '"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["q", "a"]]},
         "key 'history' needs chat turns, but the prompt is plain text; fix: set a chat template"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["q"]]},
         "pair 1 of key 'history': expected a question and its answer; got 1 items"),
        ("messages", {"messages": "hi"}, "key 'messages': expected list; got str"),
        ("messages", {"messages": []}, "key 'messages' is an empty list"),
        ("messages", {"messages": [USER, ASSISTANT], "tools": "{"}, "key 'tools': expected list or its JSON"),
        ("messages", {"messages": [USER, ASSISTANT], "tools": [{}]}, "tool 1 has no name; got keys none"),
        ("messages", {"messages": [SYSTEM, USER], "system": "b"}, "both key 'system' and a system turn; "),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "a"}]},
         "message 1 has unknown role 'bot'; fix: use one " "of system, human, gpt, tool"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{"}]}, "message 1: the call: "),
        ("segments", {"segments": [{"text": "a", "train": False}]}, "the text with \"train\": true is empty"),
        ("segments", {"segments": [{"text": " ", "train": True}]}, "the text with \"train\": true is empty"),
        ("segments", {"segments": [{"text": "a", "train": True, "weight": 0}]}, "the text with \"train\""),
        ("segments", {"segments": [{"text": "a"}]}, "segment 1: 'train': expected bool; got null"),
        ("segments", {"segments": [{"text": "a", "train": 1}]}, "segment 1: 'train': expected bool; got int"),
        ("segments", {"segments": [{"text": 1, "train": True}]}, "segment 1: 'text': expected str; got int"),
        ("segments", {"segments": ["a"]}, "segment 1: expected object; got str"),
        ("segments", {"segments": [{"text": "a", "train": True, "wieght": 0.5}]},
         "segment 1: unknown key 'wieght'; did you mean 'weight'?"),
    ],
)  # fmt: skip
def test_a_record_of_another_shape_is_refused_with_place_and_key(format, record, message):
    assert refusal(record, format).startswith(f"f.jsonl:7: {message}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{**USER, "role": "asistant"}],
         f"message 1 has unknown role 'asistant'; fix: {ROLES} (did you mean 'assistant'?)"),
        ([USER, {**USER, "role": "User"}],
         f"message 2 has unknown role 'User'; fix: {ROLES} (did you mean 'user'?)"),
        ([{**USER, "role": "zzz"}], f"message 1 has unknown role 'zzz'; fix: {ROLES}"),
        ([{**USER, "role": "user<|im_end|>"}], f"message 1 has unknown role 'user<|im_end|>'; fix: {ROLES}"),
        ([{"role": 5, "content": "a"}], "message 1: role: expected str; got int"),
        ([{"content": "a"}], "message 1 has no role; got keys 'content'"),
        ([USER, {"role": "assistant"}], "message 2 has no content; got role assistant"),
        ([USER, said(content=None, tool_calls=[])], "message 2 has no content; got role assistant"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1: content of type 'image_url' is"),
        ([{"role": "user", "content": ["a"]}], "message 1: content part: expected object; got str"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: text of a content part: "),
        ([{"role": "user", "content": 5}], "message 1: content: expected str; got int"),
        ([{"role": "user", "content": {"a": 1}}, ASSISTANT], "message 1: content: expected str; got object"),
        (["hi"], "message 1: expected object; got str"),
        ([SYSTEM, USER], "no turn of role 'assistant'; got 2 message(s)"),
        ([USER, said(content=" ")], "message 2 (role assistant) is empty; got ' '"),
        ([{"role": "user", "content": ""}, ASSISTANT], "message 1 (role user) is empty; got ''"),
        ([USER, {**USER, "tool_calls": [BERLIN]}],
         "message 2: tool_calls on a turn of role 'user'; fix: only"),
        ([USER, called("weather")], "message 2: tool call 1: expected object; got str"),
        ([USER, called(BERLIN, {"function": {}})], "message 2: tool call 2: name: expected str; got null"),
        ([USER, called({"name": "weather", "arguments": "Berlin"})],
         "message 2: tool call 1: arguments: expected object or its JSON text; got Berlin"),
        ([USER, called({"name": "weather", "arguments": [1]})], "message 2: tool call 1: arguments: "),
        ([USER, called({"name": "weather", "arguments": "[1]"})], "message 2: tool call 1: arguments: expec"),
    ],
)  # fmt: skip
def test_a_turn_of_another_shape_is_refused_with_its_number(messages, message):
    assert refusal({"messages": messages}, "messages").startswith(f"f.jsonl:7: {message}")


@pytest.mark.parametrize(
    "turns",
    [
        [ASSISTANT],
        [ASSISTANT, USER, ASSISTANT],
        [SYSTEM, ASSISTANT],
        [USER, USER, ASSISTANT],
        [USER, ASSISTANT, ASSISTANT],
        [USER, SYSTEM, ASSISTANT],
        [SYSTEM, SYSTEM, USER, ASSISTANT],
        [USER, ASSISTANT, SYSTEM, USER],
    ],
)  # fmt: skip
def test_the_order_of_turns_is_left_to_the_template(turns):
    assert chat_of(*turns) == Chat(turns)


def test_a_chat_joins_text_parts_takes_developer_for_system_and_nulls_for_missing_keys():
    filled = {"train": None, "tool_calls": None, "name": None, "reasoning_content": None}

    chat = chat_of(
        {"role": "developer", "content": "", **filled},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {**ASSISTANT, **filled},
        {"role": "tool", "content": "", **filled},
        {**ASSISTANT, "name": "Ada"},
    )

    assert chat.messages == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "4"},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "4", "name": "Ada"},
    ]


def test_an_empty_prompt_needs_a_flag():
    record = {"prompt": "", "completion": "b"}
    silent: Message = {"role": "user", "content": ""}

    assert to_example(record, format="prompt_completion", allow_empty_prompt=True) == pair("", "b")
    record = {"messages": [silent, ASSISTANT]}
    assert to_example(record, format="messages", allow_empty_prompt=True) == Chat([silent, ASSISTANT])


# --- unknown keys


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "weather", "input": {"city": "Berlin"}}, "unknown key 'input'; fix: allowed keys are type"),
        (
            {"function": {"name": "weather", "argument": {}}},
            "unknown key 'argument'; did you mean 'arguments'?",
        ),
        ({"function": {"name": "weather"}, "arguments": {}}, "unknown key 'arguments'"),
        ({"name": "weather", "arguments": {}, "parameters": {}}, "has both arguments and parameters"),
        ({"name": "weather", "arguments": {}, "id": 5}, "id: expected str; got int"),
    ],
)
def test_no_key_of_a_call_is_ignored(call, message):
    got = refusal({"messages": [USER, called(call)]}, "messages")

    assert got.startswith("f.jsonl:7: message 2: tool call 1") and message in got


def test_a_null_in_the_arguments_of_a_call_is_kept():
    call = {"id": None, "type": None, "function": {"name": "weather", "arguments": {"city": None}}}

    found = last_of(called(call))["tool_calls"]
    assert found == [{"type": "function", "function": {"name": "weather", "arguments": {"city": None}}}]


def test_tool_calls_and_function_call_exclude_each_other():
    older = called(BERLIN, function_call=BERLIN["function"])

    assert refusal({"messages": [USER, older]}, "messages").startswith(
        "f.jsonl:7: message 2 has both tool_calls and function_call; fix: remove function_call"
    )


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "gpt", "value": "good", "content": "bad"}, "message 2 has both 'value' and 'content'"),
        ({"from": "gpt", "role": "human", "value": "a"}, "message 2 has both 'from' and 'role'"),
        ({"from": "function_call", "value": "[]", "tool_calls": [BERLIN]},
         "message 2 is a function_call with tool_calls"),
    ],
)  # fmt: skip
def test_a_sharegpt_turn_has_no_duplicate_keys(turn, message):
    got = refusal({"conversations": [ASKS, turn]}, "sharegpt")

    assert got == f"f.jsonl:7: {message}; fix: remove one of them"


def test_a_content_part_has_no_unknown_keys():
    part = {"type": "text", "text": "4"}
    unsaid = {**part, "cache_control": {"type": "ephemeral"}, "annotations": [], "train": None}

    assert last_of(said(content=[unsaid]))["content"] == "4"
    assert refusal({"messages": [USER, said(content=[{**part, "train": False}])]}, "messages").startswith(
        "f.jsonl:7: message 2: content part: unknown key 'train'"
    )


@pytest.mark.parametrize("content", [[{"t": 21}], [21, 22], 21, {"t": 21}, []])
def test_the_result_of_a_tool_may_be_json(content):
    result = chat_of(USER, called(BERLIN), {"role": "tool", "content": content}, ASSISTANT).messages[2]

    assert result["content"] == json.dumps(content)


def test_functions_is_a_legacy_name_of_tools():
    assert chat_of(USER, ASSISTANT, functions=[WEATHER]).tools == [WEATHER_TOOL]


@pytest.mark.parametrize("key", ["loss_mask", "assistant_mask", "weights"])
def test_a_column_with_a_value_for_each_token_is_used_or_refused(key):
    assert refusal({"input_ids": [5, 6], key: [0, 1]}, "tokenized").startswith(
        f"f.jsonl:7: format tokenized does not read '{key}'"
    )
    assert to_example({"input_ids": [5, 6], "token_type_ids": [0, 0], key: None}, format="tokenized")


@pytest.mark.parametrize("key", ["documents", "system_prompt", "enable_thinking"])
def test_a_column_that_would_change_the_prompt_is_refused(key):
    record = {"messages": [USER, ASSISTANT], key: "a"}

    assert refusal(record, "messages").startswith(f"f.jsonl:7: format messages does not read '{key}'")


def test_a_prompt_of_messages_needs_a_completion_of_messages():
    assert refusal({"prompt": [USER], "completion": "4"}, "prompt_completion") == (
        "f.jsonl:7: key 'completion': expected list; got str; "
        "fix: write it as a list of messages, like the prompt"
    )


# --- weights of records and segments


def weights(example: AnyExample) -> list[float]:
    """Returns the weight of each segment, assistant turn, or row."""
    own = [1.0]
    if isinstance(example, Chat):
        own = [turn.get("weight", 1.0) for turn in example.messages if turn["role"] == "assistant"]
    if isinstance(example, Document):
        own = [segment.weight for segment in example.segments]
    return [weight * example.weight for weight in own]


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
@pytest.mark.parametrize(
    ("format", "record", "found"),
    [
        ("text", {"text": "a"}, [0.5]),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, [0, 0.5]),
        ("prompt_completion", {"prompt": [USER, said(), USER], "completion": [said(weight=4)]}, [0, 2]),
        ("instruct", {"instruct": "a", "label": "b"}, [0, 0.5]),
        ("alpaca", {"instruction": "a", "output": "b"}, [0, 0.5]),
        ("messages", {"messages": [USER, said(), USER, said(weight=4), USER, said(train=False)]},
         [0.5, 2, 0]),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "a", "weight": 4}]}, [2]),
        (
            "segments",
            {"segments": [{"text": "a", "train": True}, {"text": "b", "train": True, "weight": 4},
                          {"text": "c", "train": False, "weight": 4}]},
            [0.5, 2, 0],
        ),
        ("tokenized", {"input_ids": [1, 2]}, [0.5]),
    ],
)  # fmt: skip
def test_the_weight_of_a_record_multiplies_its_other_weights(format, record, found, key):
    assert weights(to_example({**record, key: 0.5}, format=format)) == found
    assert weights(to_example({**record, "weight": None}, format=format)) == [2 * weight for weight in found]


@pytest.mark.parametrize(
    ("value", "got"),
    [(-1, "-1"), (float("inf"), "inf"), (True, "True"), ("1", "'1'")],
)
def test_a_weight_is_a_nonnegative_number(value, got):
    message = f"expected a number of at least 0; got {got}"

    assert refusal({"text": "a", "weight": value}, "text") == f"f.jsonl:7: key 'weight': {message}"
    segment = {"text": "a", "train": True, "weight": value}
    assert refusal({"segments": [segment]}, "segments") == f"f.jsonl:7: segment 1: 'weight': {message}"
    assert refusal({"input_ids": [1], "weight": value}, "tokenized") == f"f.jsonl:7: key 'weight': {message}"


# --- rows that are tokenized already


@pytest.mark.parametrize(
    ("masks", "rows"),
    [
        ({"completion_mask": [0, 0, 1, 1]}, [([5, 6, 7, 8], [X, X, 7, 8])]),
        ({"assistant_masks": [False, True, False, True]}, [([5, 6, 7, 8], [X, 6, X, 8])]),
        (
            {"labels": [5, X, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 1, 0]},
            [([5, 6, 7, 8], [X, X, 7, X])],
        ),
        ({"attention_mask": [1, 1, 1, 1]}, [([5, 6, 7, 8], [X, 6, 7, 8])]),
        ({"attention_mask": [1, 1, 0, 0]}, [([5, 6], [X, 6])]),
        ({"attention_mask": [0, 1, 1, 0], "labels": [5, X, 7, 8]}, [([6, 7], [X, 7])]),
        ({"attention_mask": [0, 1, 1, 1], "completion_mask": [1, 1, 0, 1]}, [([6, 7, 8], [X, X, 8])]),
        ({"position_ids": [0, 1, 0, 1]}, [([5, 6], [X, 6]), ([7, 8], [X, 8])]),
        ({"position_ids": [0, 0, 1, 2]}, [([5], [X]), ([6, 7, 8], [X, 7, 8])]),
        ({"position_ids": [0, 1, 2, 3]}, [([5, 6, 7, 8], [X, 6, 7, 8])]),
        ({"seq_lengths": [1, 3], "labels": [5, 6, X, 8]}, [([5], [X]), ([6, 7, 8], [X, X, 8])]),
    ],
)
def test_every_mask_of_a_tokenized_record_is_used(masks, rows):
    """A token has a label if all masks allow it; padding is removed; documents are separated."""
    tokens = cast(Tokens, to_example({"input_ids": [5, 6, 7, 8], **masks}, format="tokenized"))

    found = tokens_to_rows(tokens, byte_tokenizer())

    assert [(row["input_ids"], row["labels"]) for row in found] == rows


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": []}, "key 'input_ids' is an empty list"),
        ({"input_ids": None}, "key 'input_ids' is null"),
        ({"input_ids": [1, -1]}, "key 'input_ids', position 1: not a token id; got -1"),
        ({"input_ids": [1, -100]}, "key 'input_ids', position 1: not a token id; got -100"),
        ({"input_ids": [2**31]}, "key 'input_ids', position 0: not a token id; got 2147483648"),
        ({"input_ids": [True]}, "key 'input_ids', position 0: expected int; got bool"),
        ({"input_ids": [1.0]}, "key 'input_ids', position 0: expected int; got float"),
        ({"input_ids": [1], "labels": None}, "key 'labels' is null"),
        ({"input_ids": [1], "labels": [-1]}, "key 'labels', position 0: not a token id; got -1"),
        ({"input_ids": [1], "labels": [1, 2]}, "input_ids and labels differ in length; got 1"),
        ({"input_ids": [1], "completion_mask": None}, "key 'completion_mask' is null"),
        ({"input_ids": [1], "completion_mask": [1, 1]}, "input_ids and completion_mask differ in length"),
        ({"input_ids": [1], "assistant_masks": [-100]}, "key 'assistant_masks', position 0: "),
        ({"input_ids": [1], "attention_mask": None}, "key 'attention_mask' is null"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask has a gap between tokens"),
        # LLaMA-Factory's neat_packing numbers the documents of a row like this.
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1, 2]}, "key 'attention_mask', position 2: "),
        ({"input_ids": [1, 2], "completion_mask": [0, 2]}, "key 'completion_mask', position 1: "),
        ({"input_ids": [1, 2], "position_ids": [1, 2]}, "position_ids do not count from 0 in each document"),
        ({"input_ids": [1, 2], "position_ids": [0, 2]}, "position_ids do not count from 0 in each document"),
        ({"input_ids": [1, 2], "seq_lengths": [1]}, "seq_lengths do not add up to the row; got 1 of 2"),
        ({"input_ids": [1, 2], "seq_lengths": [2, 0]}, "seq_lengths do not add up to the row"),
        ({"input_ids": [1, 2, 3], "seq_lengths": [1, 2], "attention_mask": [1, 1, 0]},
         "a packed row with padding; fix: remove the padding and the attention_mask"),
    ],
)  # fmt: skip
def test_an_invalid_tokenized_record_is_refused_with_the_position(record, message):
    assert refusal(record, "tokenized").startswith(f"f.jsonl:7: {message}")


def test_labels_in_only_some_records_of_a_file_are_refused():
    first: dict[str, tuple[str, str]] = {}
    check_same_masks({"input_ids": [1], "labels": [1]}, "f.jsonl:1", first=first)
    check_same_masks({"input_ids": [2], "labels": [2], "id": 7}, "f.jsonl:2", first=first)
    check_same_masks({"input_ids": [2], "completion_mask": [1]}, "g.jsonl:1", first=first)

    for gap in ({"input_ids": [3]}, {"input_ids": [3], "labels": None}):
        with pytest.raises(DataError) as error:
            check_same_masks(gap, "f.jsonl:3", first=first)
        assert str(error.value) == (
            "f.jsonl:3: the record has masks none, but f.jsonl:1 has masks 'labels'; "
            "fix: split the file by kind of record"
        )


# --- columns


def test_fields_name_the_columns_and_errors_name_the_column():
    fields = {"prompt": "question", "completion": "answer"}
    record = {"question": "a", "answer": "b", "prompt": "not read"}

    assert to_example(record, format="prompt_completion", fields=fields) == pair("a", "b")
    assert unknown_keys(record, "prompt_completion", fields=fields) == ["prompt"]
    empty = {"question": "a", "answer": None}
    assert "key 'answer' is null" in refusal(empty, "prompt_completion", fields=fields)
    assert refusal({"question": "a"}, "prompt_completion", fields=fields).startswith(
        "f.jsonl:7: missing key 'answer'; got keys 'question'; fix: add it"
    )


def test_a_column_in_fields_must_exist_even_for_an_optional_key():
    record = {"instruct": "a", "label": "b"}
    assert "missing key 'context'" in refusal(record, "instruct", fields={"input": "context"})
    assert "missing key 'targets'" in refusal({"input_ids": [1]}, "tokenized", fields={"labels": "targets"})
    assert "missing key 'importance'" in refusal(record, "instruct", fields={"weight": "importance"})


def test_an_unknown_format_or_fields_key_is_an_error_of_the_recipe():
    with pytest.raises(RecipeError, match=r"^unknown format 'instuct'; did you mean 'instruct'"):
        to_example({"text": "a"}, format="instuct")
    with pytest.raises(RecipeError, match=r"^fields: format text has no key 'txt'; did you mean 'text'"):
        to_example({"text": "a"}, format="text", fields={"txt": "a"})


@pytest.mark.parametrize(
    ("format", "record", "keys"),
    [
        ("text", {"text": "a", "messages": [USER]}, "'messages'"),
        ("text", {"text": "a", "labels": [1], "attention_mask": [1]}, "'labels', 'attention_mask'"),
        ("prompt_completion", {"prompt": "a", "completion": "b", "system": "Be brief."}, "'system'"),
        ("prompt_completion", {"prompt": "a", "completion": "b", "history": [["q", "a"]]}, "'history'"),
        ("alpaca", {"instruction": "a", "output": "b", "tools": [WEATHER]}, "'tools'"),
        ("instruct", {"instruct": "a", "label": "b", "chat_template_kwargs": {"x": 1}}, "'chat_template_kwa"),
        ("messages", {"messages": [USER, ASSISTANT], "train": False}, "'train'"),
        ("messages", {"messages": [USER, ASSISTANT], "masked": True}, "'masked'"),
        ("instruct", {"instruct": "a", "label": "b", "reasoning": "two and two"}, "'reasoning'"),
    ],
)  # fmt: skip
def test_an_unread_column_that_could_affect_the_labels_is_refused(format, record, keys):
    text = refusal(record, format, strict=False)

    assert text.startswith(f"f.jsonl:7: format {format} does not read {keys}")
    empty = {key: None if f"'{key}'" in text.partition(";")[0] else value for key, value in record.items()}
    to_example(empty, format=format)  # a table fills a column with null where another record has it


def test_other_columns_are_ignored_and_can_be_listed_or_refused():
    record = {"text": "a", "source": "web", "id": 1}
    assert to_example(record, format="text") == Document([T("a")])
    assert unknown_keys(record, "text") == ["source", "id"]
    assert refusal(record, "text", strict=True).startswith(
        "f.jsonl:7: format text does not read 'source', 'id'; fix: it reads 'text', "
    )
    misspelt = {"instruct": "a", "imput": "b", "label": "c"}
    assert "does not read 'imput'; did you mean 'input'?" in refusal(misspelt, "instruct", strict=True)


def test_a_format_is_detected_if_the_keys_match_only_one():
    assert detect_format(["id", "prompt", "completion", "source"]) == "prompt_completion"
    with pytest.raises(DataError) as error:
        detect_format(["instruction", "output", "text"], "f.jsonl:1")
    assert str(error.value).startswith(
        "f.jsonl:1: the keys match the formats text, alpaca; got keys 'instruction', 'output', 'text'; fix"
    )
    with pytest.raises(DataError) as error:
        detect_format(["question"], "f.jsonl:1")
    assert str(error.value) == (
        "f.jsonl:1: the keys match no format; got keys 'question'; fix: set format, and fields if needed ("
        "text: 'text'; prompt_completion: 'prompt', 'completion'; instruct: 'instruct', 'label'; "
        "alpaca: 'instruction', 'output'; messages: 'messages'; sharegpt: 'conversations'; "
        "segments: 'segments'; tokenized: 'input_ids')"
    )


def test_a_file_of_mixed_formats_is_refused_with_the_first_line_of_each():
    first: dict[str, tuple[str, str]] = {}
    assert check_same_schema({"text": "a"}, "f.jsonl:1", first=first) == "text"
    assert check_same_schema({"text": "b", "id": 1}, "f.jsonl:2", first=first) == "text"
    assert check_same_schema({"messages": []}, "g.jsonl:1", first=first) == "messages"
    with pytest.raises(DataError) as error:
        check_same_schema({"prompt": "a", "completion": "b"}, "f.jsonl:9", first=first)
    assert str(error.value).startswith(
        "f.jsonl:9: the record has format prompt_completion, but f.jsonl:1 has format text"
    )


# --- prompts


@pytest.mark.parametrize(
    ("format", "record", "prompt"),
    [
        ("text", {"text": "Once"}, Document([T("Once")])),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, Document([R("a")])),
        ("prompt_completion", {"prompt": "a"}, Document([R("a")])),
        ("instruct", {"instruct": "a:", "input": "b"}, Document([R("a:b")])),
        ("alpaca", {"instruction": "a"}, Document([R(PREAMBLE + "### Instruction:\na\n\n### Response:\n")])),
        ("messages", {"messages": [SYSTEM, USER]}, Chat([SYSTEM, USER])),
        ("messages", {"messages": [USER, ASSISTANT]}, Chat([USER])),
        ("messages", {"messages": [USER, ASSISTANT, USER, ASSISTANT]}, Chat([USER, ASSISTANT, USER])),
        ("messages", {"messages": [USER, ASSISTANT], "tools": [WEATHER]}, Chat([USER], [WEATHER_TOOL])),
        ("sharegpt", {"conversations": [{"from": "human", "value": "2+2?"}]}, Chat([USER])),
    ],
)  # fmt: skip
def test_a_prompt_is_the_record_without_its_target(format, record, prompt):
    assert to_prompt(record, format=format) == prompt


@pytest.mark.parametrize(
    ("format", "record", "message"),
    [
        ("segments", {"segments": [{"text": "a", "train": True}]},
         "a record of format segments cannot be used as a prompt"),
        ("tokenized", {"input_ids": [1]}, "a record of format tokenized cannot be used as a prompt"),
        ("messages", {"messages": [SYSTEM]}, "no turn of role 'user'; got 1 message(s)"),
        ("prompt_completion", {"prompt": ""}, "key 'prompt' is empty; got ''"),
        ("instruct", {"label": "a"}, "missing key 'instruct'; got keys 'label'"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_prompt_is_refused(format, record, message):
    with pytest.raises(DataError) as error:
        to_prompt(record, format=format, where="f.jsonl:7")
    assert str(error.value).startswith(f"f.jsonl:7: {message}")


# --- custom functions


def read_question(record: Any) -> Document:
    return Document([R(record["question"]), T(record["answer"])])


def test_a_custom_function_reads_records_in_training_and_generation(tmp_path, monkeypatch):
    record = {"question": "2+2?", "answer": "4", "weight": "heavy"}
    (tmp_path / "own_formats.py").write_text(
        "from hf_clm.schema import Document, Segment\n"
        "def read(record):\n"
        "    return Document([Segment(record['question'], 0.0), Segment(record['answer'], 1.0)])\n"
        "NUMBER = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    for format in (read_question, "own_formats:read"):
        assert to_example(record, format=format, strict=True) == pair("2+2?", "4")
        assert to_prompt(record, format=format) == Document([R("2+2?")])
    parts = [R("Q1 "), T("A1 "), R("Q2 "), T("A2")]
    assert to_prompt({}, format=lambda record: Document(parts)) == Document(parts[:3])
    for name, message in [
        ("own_formats:write", "no such format 'own_formats:write': module 'own_formats' has no attribute"),
        ("own_format:read", "no such format 'own_format:read': No module named 'own_format'"),
        ("own_formats:NUMBER", "own_formats:NUMBER is not a function; got int"),
        (":read", "no such format ':read': "),
    ]:
        with pytest.raises(RecipeError) as error:
            to_example(record, format=name)
        assert str(error.value).startswith(f"format: {message}")
    sys.modules.pop("own_formats")


def test_a_chat_of_a_custom_function_is_checked_and_keeps_its_weights():
    def read(record: Any) -> Chat:
        return Chat([USER, {**ASSISTANT, "weight": record["weight"]}])

    assert to_example({"weight": 0.5}, format=read) == Chat([USER, {**ASSISTANT, "weight": 0.5}])
    assert refusal({}, lambda record: Chat([USER, cast(Any, said(trian=False))])).startswith(
        "f.jsonl:7: message 2: unknown key 'trian'; did you mean 'train'?"
    )


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (read_question, "the format's function raises KeyError: 'question'; got keys 'q'"),
        (lambda record: record["q"] + 1, "the format's function raises TypeError: "),
        (lambda record: record, "the keys match no format; got keys 'q'; fix: set format, and fields"),
        (lambda record: None, "the format's function must return a Chat, a Document or a record; got"),
        (lambda record: Document([R("a")]), "the format's function returned a document without"),
        (lambda record: Document([R("a"), T(" ")]), "the format's function returned a document without"),
        (lambda record: Chat([USER]), "no turn of role 'assistant'; got 1 message(s)"),
    ],
)  # fmt: skip
def test_an_error_in_a_custom_function_is_reported_with_the_record(read, message):
    assert refusal({"q": "2+2?"}, read).startswith(f"f.jsonl:7: {message}")


def test_every_format_of_the_schema_has_its_function():
    names = "text prompt_completion instruct alpaca messages sharegpt segments tokenized"
    assert list(FORMATS) == list(Format.__args__) == names.split()


@pytest.mark.parametrize("missing", [float("nan"), np.float32("nan"), pandas.NA, pandas.NaT])
def test_missing_values_of_tables_are_refused_like_null(missing):
    fix = "fix: fill it in, or remove the record"
    record = {"prompt": "a", "completion": missing}
    name = str(missing).replace("nan", "NaN")

    assert refusal(record, "prompt_completion") == f"f.jsonl:7: key 'completion' is {name}; {fix}"
    assert refusal({"text": "a", "weight": missing}, "text") == f"f.jsonl:7: key 'weight' is {name}; {fix}"
    given = {"instruct": "a", "input": missing, "label": "b"}
    assert to_example(given, format="instruct") == pair("a", "b")  # as with a null


@pytest.mark.parametrize("column", ["inputs", "Input", "INPUT", "in_put", " input"])
@pytest.mark.parametrize(
    ("format", "record"),
    [("instruct", {"instruct": "a", "label": "b"}), ("alpaca", {"instruction": "a", "output": "b"})],
)
def test_an_optional_key_in_another_spelling_is_refused(format, record, column):
    fix = f"fix: rename it, or map it with fields: {{input: {column}}}"
    message = f"f.jsonl:7: the format has no key {column!r}; did you mean 'input'?; {fix}"

    assert refusal({**record, column: "c"}, format) == message
    with pytest.raises(DataError, match="did you mean 'input'"):
        to_prompt({**record, column: "c"}, format=format)
    for other in ({column: ""}, {column: None}, {column: "c", "input": "d"}):  # nothing is left out
        to_example({**record, **other}, format=format)
    mapped = to_example({**record, column: "c"}, format=format, fields={"input": column})
    assert mapped == to_example({**record, "input": "c"}, format=format)


@pytest.mark.parametrize(
    ("format", "record", "fitting"),
    [
        ("instruct", {"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ("alpaca", {"instruct": "a", "label": "b"}, "instruct"),
        ("prompt_completion", {"messages": [USER, ASSISTANT]}, "messages"),
        ("messages", {"conversations": [ASKS, SAYS]}, "sharegpt"),
    ],
)
def test_keys_of_another_format_suggest_that_format(format, record, fitting):
    fix = f"fix: set format: {fitting}, which matches these keys; or map the columns with fields"

    assert refusal(record, format).startswith(
        f"f.jsonl:7: missing key '{FORMATS[format].required[0]}'; got keys"
    )
    assert refusal(record, format).endswith(fix)
    with pytest.raises(DataError, match=f"format: {fitting}"):
        to_prompt(record, format=format)


def test_a_format_is_detected_from_the_keys_in_fields():
    fields = {"instruct": "Frage", "label": "Antwort"}
    record = {"Frage": "2+2?", "Antwort": "4", "text": "other"}

    assert detect_format(record, fields=fields) == "instruct"
    assert check_same_schema(record, "f.jsonl:1", first={}, fields=fields) == "instruct"
    assert (
        detect_format({"prompt": "a", "answer": "b"}, fields={"completion": "answer"}) == "prompt_completion"
    )
    assert detect_format({"text": "a", "w": 2}, fields={"weight": "w"}) == "text"
    with pytest.raises(RecipeError, match="fields: no format has all of the keys 'instrct', 'label'"):
        detect_format(record, fields={"instrct": "Frage", "label": "Antwort"})
    with pytest.raises(DataError, match="missing key 'Frage'; got keys 'Fragen'; did you mean 'Fragen'"):
        to_example({"Fragen": "a"}, format=detect_format({"Fragen": "a"}, fields=fields), fields=fields)


def test_fields_reach_into_nested_columns():
    record = {"instruction": "add", "instances": [{"input": "2+2", "output": "4"}], "meta": {"id": 7}}
    fields = {"input": "instances[0].input", "output": "instances[0].output"}

    assert to_example(record, format="alpaca", fields=fields) == to_example(
        {"instruction": "add", "input": "2+2", "output": "4"}, format="alpaca"
    )
    assert unknown_keys(record, "alpaca", fields=fields) == ["meta"]
    turns = {"messages": [USER, ASSISTANT]}
    fields = {"prompt": "messages[0].content", "completion": "messages[-1].content"}
    assert to_example(turns, format="prompt_completion", fields=fields) == pair("2+2?", "4")
    flat = {"a.b": "flat", "a": {"b": "nested"}}
    assert to_example(flat, format="text", fields={"text": "a.b"}) == Document([T("flat")])


@pytest.mark.parametrize(
    ("column", "got"),
    [
        ("metta.title", "keys 'meta', 'tags'; did you mean 'meta'?"),
        ("meta.titel", "meta without 'titel', with keys 'title'; did you mean 'title'?"),
        ("tags[2]", "tags, which is a list of 2, without '[2]'"),
        ("tags.first", "tags, which is a list of 2, without '.first'"),
        ("meta.title.x", "meta.title, which is str, without '.x'"),
    ],
)
def test_the_missing_part_of_a_nested_column_is_reported(column, got):
    record = {"meta": {"title": "t"}, "tags": ["a", "b"]}
    fix = "fix: add it, or set its column with fields: {text: COLUMN}"

    assert (
        refusal(record, "text", fields={"text": column})
        == f"f.jsonl:7: missing key {column!r}; got {got}; {fix}"
    )
