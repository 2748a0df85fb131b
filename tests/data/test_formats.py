"""Records to Examples, format by format, with the message for each record that is refused."""

from typing import cast

import pytest

from hf_clm.data.formats import FORMATS, check_same_schema, detect_format, to_example, to_prompt, unknown_keys
from hf_clm.errors import DataError, RecipeError
from hf_clm.schema import ChatExample, Format, Message, PromptExample, Segment, SegmentsExample, TextExample

USER: Message = {"role": "user", "content": "2+2?"}
ASSISTANT: Message = {"role": "assistant", "content": "4"}
SYSTEM: Message = {"role": "system", "content": "Be brief."}
ROLES = "one of system, user, assistant, tool"


def said(**more) -> dict:
    """An assistant turn with other keys beside its content."""
    return {"role": "assistant", "content": "a", **more}


def asked(content) -> list[dict]:
    return [{"role": "user", "content": content}]


def refusal(record, format, **options) -> str:
    with pytest.raises(DataError) as error:
        to_example(record, format=format, where="f.jsonl:7", **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("format", "record", "example"),
    [
        ("text", {"text": " a\n"}, TextExample(" a\n")),
        ("prompt_completion", {"prompt": "a ", "completion": " b"}, PromptExample("a ", " b")),
        ("instruct", {"instruct": "Go:", "input": "a\nb", "label": "c"}, PromptExample("Go:\na\nb\n", "c")),
        ("instruct", {"instruct": "Go:", "input": "", "label": "c"}, PromptExample("Go:\n", "c")),
        ("instruct", {"instruct": "Go:", "input": None, "label": "c"}, PromptExample("Go:\n", "c")),
        ("instruct", {"instruct": "Go:", "label": "c"}, PromptExample("Go:\n", "c")),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 {2}", "output": "3"},
            PromptExample("### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n", "3"),
        ),
        (
            "alpaca",
            {"instruction": "Add.", "input": "", "output": "3"},
            PromptExample("### Instruction:\nAdd.\n\n### Response:\n", "3"),
        ),
        ("messages", {"messages": [SYSTEM, USER, ASSISTANT]}, ChatExample([SYSTEM, USER, ASSISTANT])),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
            ChatExample([USER, ASSISTANT]),
        ),
        (
            "sharegpt",
            {
                "system": "Be brief.",
                "conversations": [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": "4"}],
            },
            ChatExample([SYSTEM, USER, ASSISTANT]),
        ),
        (
            "segments",
            {"segments": [{"text": "a", "train": False}, {"text": " b", "train": True}]},
            SegmentsExample([Segment("a", is_target=False), Segment(" b", is_target=True)]),
        ),
        ("tokenized", {"input_ids": [5, 0, 7]}, {"input_ids": [5, 0, 7], "labels": [5, 0, 7]}),
        ("tokenized", {"input_ids": [5, 7], "labels": None}, {"input_ids": [5, 7], "labels": [5, 7]}),
        ("tokenized", {"input_ids": [5, 7], "labels": [-100, 7]}, {"input_ids": [5, 7], "labels": [-100, 7]}),
    ],
)  # fmt: skip
def test_every_format_gives_its_example(format, record, example):
    assert to_example(record, format=format) == example
    assert detect_format(record) == format


@pytest.mark.parametrize(
    ("format", "record", "message"),
    [
        (
            "prompt_completion",
            {"prompt": "a", "completon": "b"},
            "missing key 'completion'; got keys 'prompt', 'completon'; did you mean 'completon'?; "
            "fix: add it, or name its column: fields: {completion: COLUMN}",
        ),
        ("text", {}, "missing key 'text'; got keys none; fix: add it, or name its column: fields:"),
        ("text", {"text": None}, "key 'text' is null; fix: fill it in, or remove the record"),
        ("text", {"text": 5}, "key 'text': expected str; got int"),
        ("text", {"text": " \n"}, "key 'text' is empty; got ' \\n'; fix: fill it in, or remove the record"),
        ("text", [1], "record: expected object; got list"),
        ("prompt_completion", {"prompt": 5, "completion": "b"}, "key 'prompt': expected str; got int"),
        ("prompt_completion", {"prompt": ["a"], "completion": "b"}, "key 'prompt': expected str; got list"),
        ("prompt_completion", {"prompt": {}, "completion": "b"}, "key 'prompt': expected str; got object"),
        ("prompt_completion", {"prompt": "a", "completion": True}, "key 'completion': expected str; got"),
        ("prompt_completion", {"prompt": "", "completion": "b"}, "key 'prompt' is empty; got ''"),
        ("prompt_completion", {"prompt": "a", "completion": ""}, "key 'completion' is empty; got ''"),
        ("prompt_completion", {"prompt": "a", "completion": "\t "}, "key 'completion' is empty; got '\\t '"),
        ("instruct", {"instruct": "a", "label": None}, "key 'label' is null"),
        ("instruct", {"instruct": "a", "label": ""}, "key 'label' is empty; got ''"),
        ("instruct", {"instruct": "a", "label": "b", "input": 5}, "key 'input': expected str; got int"),
        ("alpaca", {"instruction": "a", "output": " "}, "key 'output' is empty; got ' '"),
        ("messages", {"messages": "hi"}, "key 'messages': expected list; got str"),
        ("messages", {"messages": []}, "key 'messages' is an empty list"),
        ("segments", {"segments": [{"text": "a", "train": False}]}, "the text with \"train\": true is empty"),
        ("segments", {"segments": [{"text": " ", "train": True}]}, "the text with \"train\": true is empty"),
        ("segments", {"segments": [{"text": "a"}]}, "segment 1: 'train': expected bool; got null"),
        ("segments", {"segments": [{"text": "a", "train": 1}]}, "segment 1: 'train': expected bool; got int"),
        ("segments", {"segments": [{"text": 1, "train": True}]}, "segment 1: 'text': expected str; got int"),
        ("segments", {"segments": ["a"]}, "segment 1: expected object; got str"),
        ("tokenized", {"input_ids": []}, "key 'input_ids' is an empty list"),
        ("tokenized", {"input_ids": [1, -1]}, "key 'input_ids', position 1: not a token id; got -1"),
        ("tokenized", {"input_ids": [1, -100]}, "key 'input_ids', position 1: not a token id; got -100"),
        ("tokenized", {"input_ids": [True]}, "key 'input_ids', position 0: expected int; got bool"),
        ("tokenized", {"input_ids": [1.0]}, "key 'input_ids', position 0: expected int; got float"),
        ("tokenized", {"input_ids": [1], "labels": [-1]}, "key 'labels', position 0: not a token id; got -1"),
        ("tokenized", {"input_ids": [1], "labels": [1, 2]}, "input_ids and labels differ in length; got 1"),
    ],
)  # fmt: skip
def test_a_record_of_another_shape_is_refused_with_place_and_key(format, record, message):
    assert refusal(record, format).startswith(f"f.jsonl:7: {message}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{**USER, "role": "asistant"}],
            f"message 1 has role 'asistant'; fix: {ROLES} (did you mean 'assistant'?)",
        ),
        ([USER, {**USER, "role": "User"}], f"message 2 has role 'User'; fix: {ROLES} (did you mean 'user'?)"),
        ([{**USER, "role": "zzz"}], f"message 1 has role 'zzz'; fix: {ROLES}"),
        ([{**USER, "role": "user<|im_end|>"}], f"message 1 has role 'user<|im_end|>'; fix: {ROLES}"),
        ([{"role": 5, "content": "a"}], "message 1: role: expected str; got int"),
        ([{"from": "human", "value": "a"}], "message 1 has no role; got keys 'from', 'value'"),
        ([USER, {"role": "assistant"}], "message 2 has no content; got keys 'role'"),
        ([USER, {"role": "assistant", "content": None}], "message 2 has no content; got keys 'role'"),
        ([USER, said(tool_calls=[{}])], "message 2: tool_calls is not supported"),
        ([USER, said(function_call={"name": "f"})], "message 2: function_call is not supported"),
        ([USER, said(weight=0)], "message 2: weight is not supported; fix: use \"train\": false"),
        (asked([{"type": "image_url"}]), "message 1: content of type 'image_url' is not supported"),
        (asked(["a"]), "message 1: content part: expected object; got str"),
        (asked([{"type": "text"}]), "message 1: text of a content part: expected str; got null"),
        (asked(5), "message 1: content: expected str; got int"),
        (["hi"], "message 1: expected object; got str"),
        ([ASSISTANT], "message 1 has role 'assistant' at the start; fix: at most one system turn, first;"),
        ([SYSTEM, ASSISTANT], "message 2 has role 'assistant' after role 'system'"),
        ([USER, USER, ASSISTANT], "message 2 has role 'user' after role 'user'"),
        ([USER, ASSISTANT, ASSISTANT], "message 3 has role 'assistant' after role 'assistant'"),
        ([USER, SYSTEM, ASSISTANT], "message 2 has role 'system' after role 'user'"),
        ([SYSTEM, SYSTEM, USER], "message 2 has role 'system' after role 'system'"),
        ([USER, {"role": "tool", "content": "a"}], "message 2 has role 'tool' after role 'user'"),
        ([SYSTEM, USER], "no turn of role 'assistant'; got 2 message(s)"),
        ([USER, {"role": "assistant", "content": " "}], "message 2 (role assistant) is empty; got ' '"),
        ([{"role": "user", "content": ""}, ASSISTANT], "message 1 (role user) is empty; got ''"),
        ([{**USER, "train": False}, ASSISTANT], "message 1: 'train' on a turn of role 'user'; fix: only"),
        ([USER, {**ASSISTANT, "train": 1}], "message 2: 'train': expected bool; got int"),
    ],
)  # fmt: skip
def test_a_chat_that_is_not_in_order_is_refused_with_the_number_of_the_message(messages, message):
    assert refusal({"messages": messages}, "messages").startswith(f"f.jsonl:7: {message}")


def test_a_sharegpt_chat_has_the_same_checks_under_its_own_names():
    record = {"system": "s", "conversations": [{"from": "gpt", "value": "a"}]}
    assert refusal(record, "sharegpt").startswith(
        "f.jsonl:7: message 1 has role 'assistant' after role 'system'"
    )
    record = {"conversations": [{"from": "bot", "value": "a"}]}
    assert (
        refusal(record, "sharegpt")
        == "f.jsonl:7: message 1 has role 'bot'; fix: one of system, human, gpt, tool"
    )


def test_a_chat_keeps_train_flags_joins_text_parts_and_takes_developer_for_system():
    record = {
        "messages": [
            {"role": "developer", "content": ""},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "call", "train": False},
            {"role": "tool", "content": ""},
            {"role": "assistant", "content": "c", "train": True, "name": "x"},
        ]
    }
    assert to_example(record, format="messages") == ChatExample(
        [
            {"role": "system", "content": ""},
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "call", "train": False},
            {"role": "tool", "content": ""},
            {"role": "assistant", "content": "c", "train": True},
        ]
    )


def test_keys_of_a_turn_that_a_parquet_file_filled_with_null_count_as_missing():
    filled = {"train": None, "tool_calls": None, "weight": None}
    record = {"messages": [{**USER, **filled}, {**ASSISTANT, **filled}]}
    assert to_example(record, format="messages") == ChatExample([USER, ASSISTANT])


def test_an_empty_prompt_is_allowed_by_a_flag_only():
    record = {"prompt": "", "completion": "b"}
    assert to_example(record, format="prompt_completion", allow_empty_prompt=True) == PromptExample("", "b")
    chat = {"messages": [{"role": "user", "content": ""}, ASSISTANT]}
    assert to_example(chat, format="messages", allow_empty_prompt=True) == ChatExample(
        [{"role": "user", "content": ""}, ASSISTANT]
    )


def test_fields_name_the_columns_and_errors_name_the_column():
    fields = {"prompt": "question", "completion": "answer"}
    record = {"question": "a", "answer": "b", "prompt": "not read"}
    assert to_example(record, format="prompt_completion", fields=fields) == PromptExample("a", "b")
    assert unknown_keys(record, "prompt_completion", fields=fields) == ["prompt"]
    assert "key 'answer' is null" in refusal(
        {"question": "a", "answer": None}, "prompt_completion", fields=fields
    )
    assert refusal({"question": "a"}, "prompt_completion", fields=fields).startswith(
        "f.jsonl:7: missing key 'answer'; got keys 'question'; fix: add it"
    )


def test_a_column_that_fields_name_must_be_there_even_for_an_optional_key():
    record = {"instruct": "a", "label": "b"}
    assert "missing key 'context'" in refusal(record, "instruct", fields={"input": "context"})
    assert "missing key 'targets'" in refusal({"input_ids": [1]}, "tokenized", fields={"labels": "targets"})


def test_an_unknown_format_or_fields_key_is_an_error_of_the_recipe():
    with pytest.raises(RecipeError, match=r"^unknown format 'instuct'; did you mean 'instruct'"):
        to_example({"text": "a"}, format=cast(Format, "instuct"))
    with pytest.raises(RecipeError, match=r"^fields: format text has no key 'txt'; did you mean 'text'"):
        to_example({"text": "a"}, format="text", fields={"txt": "a"})


def test_unknown_keys_are_ignored_and_can_be_listed_or_refused():
    record = {"text": "a", "source": "web", "id": 1}
    assert to_example(record, format="text") == TextExample("a")
    assert unknown_keys(record, "text") == ["source", "id"]
    assert refusal(record, "text", strict=True) == (
        "f.jsonl:7: unknown keys 'source', 'id'; "
        "fix: format text reads 'text'; remove the others, or leave strict off"
    )
    misspelt = {"instruct": "a", "imput": "b", "label": "c"}
    assert "unknown keys 'imput'; did you mean 'input'?" in refusal(misspelt, "instruct", strict=True)


def test_a_format_is_told_from_the_keys_where_they_fit_one_only():
    assert detect_format(["id", "prompt", "completion", "source"]) == "prompt_completion"
    with pytest.raises(DataError) as error:
        detect_format(["instruction", "output", "text"], "f.jsonl:1")
    assert str(error.value).startswith(
        "f.jsonl:1: the keys fit the formats text, alpaca; got keys 'instruction', 'output', 'text'; fix"
    )
    with pytest.raises(DataError) as error:
        detect_format(["question"], "f.jsonl:1")
    assert str(error.value) == (
        "f.jsonl:1: the keys fit no format; got keys 'question'; fix: name the format, and fields ("
        "text: 'text'; prompt_completion: 'prompt', 'completion'; instruct: 'instruct', 'label'; "
        "alpaca: 'instruction', 'output'; messages: 'messages'; sharegpt: 'conversations'; "
        "segments: 'segments'; tokenized: 'input_ids')"
    )


def test_a_file_of_mixed_formats_is_refused_with_the_first_line_of_each():
    first = {}
    assert check_same_schema({"text": "a"}, "f.jsonl:1", first=first) == "text"
    assert check_same_schema({"text": "b", "id": 1}, "f.jsonl:2", first=first) == "text"
    assert check_same_schema({"messages": []}, "g.jsonl:1", first=first) == "messages"
    with pytest.raises(DataError) as error:
        check_same_schema({"prompt": "a", "completion": "b"}, "f.jsonl:9", first=first)
    assert str(error.value) == (
        "f.jsonl:9: a record of format prompt_completion in a file of format text (f.jsonl:1); "
        "got keys 'prompt', 'completion'; fix: one format a file: split it"
    )


@pytest.mark.parametrize(
    ("format", "record", "prompt"),
    [
        ("text", {"text": "Once"}, TextExample("Once")),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, PromptExample("a", "")),
        ("prompt_completion", {"prompt": "a"}, PromptExample("a", "")),
        ("instruct", {"instruct": "a", "input": "b"}, PromptExample("a\nb\n", "")),
        ("alpaca", {"instruction": "a"}, PromptExample("### Instruction:\na\n\n### Response:\n", "")),
        ("messages", {"messages": [SYSTEM, USER]}, ChatExample([SYSTEM, USER])),
        ("messages", {"messages": [USER, ASSISTANT]}, ChatExample([USER])),
        ("messages", {"messages": [USER, ASSISTANT, USER, ASSISTANT]}, ChatExample([USER, ASSISTANT, USER])),
        ("sharegpt", {"conversations": [{"from": "human", "value": "2+2?"}]}, ChatExample([USER])),
    ],
)
def test_a_prompt_is_the_record_without_its_target(format, record, prompt):
    assert to_prompt(record, format=format) == prompt


@pytest.mark.parametrize(
    ("format", "record", "message"),
    [
        ("segments", {"segments": []}, "a record of format segments cannot be used as a prompt"),
        ("tokenized", {"input_ids": [1]}, "a record of format tokenized cannot be used as a prompt"),
        ("messages", {"messages": [SYSTEM]}, "no turn of role 'user'; got 1 message(s)"),
        ("prompt_completion", {"prompt": ""}, "key 'prompt' is empty; got ''"),
        ("instruct", {"label": "a"}, "missing key 'instruct'; got keys 'label'"),
    ],
)
def test_what_cannot_be_a_prompt_is_refused(format, record, message):
    with pytest.raises(DataError) as error:
        to_prompt(record, format=format, where="f.jsonl:7")
    assert str(error.value).startswith(f"f.jsonl:7: {message}")


def test_every_format_of_the_schema_has_its_function():
    names = "text prompt_completion instruct alpaca messages sharegpt segments tokenized"
    assert list(FORMATS) == names.split()
