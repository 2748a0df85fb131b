"""Checks and normalizes the turns of a chat: roles, contents, tool calls, reasoning and weights.

No key of a message is ignored. Variants of OpenAI's format are converted to a single form.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_clm.data.read.row import Record, RecordView, listed
from hf_clm.errors import did_you_mean
from hf_clm.schema import Chat, Json, Message, Role, ToolCall

# Names of the roles by format; error messages suggest the first four.
OPENAI_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "developer": "system", "function": "tool",
}  # fmt: skip
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "gpt": "assistant", "tool": "tool", "user": "user",
    "assistant": "assistant", "function_call": "assistant", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip

# Names that other tools use for a message's weight. ``masked`` is the inverse of the others.
SWITCHES = ("train", "training", "loss", "masked")
WEIGHT_NAMES = ("weight", "loss_weight", "loss")
REASONING = ("reasoning", "reasoning_content", "thinking")
CALL_KEYS, FUNCTION_KEYS = ("type", "id", "index", "function"), ("name", "arguments", "parameters")
PART_KEYS = ("type", "text", "cache_control", "annotations")  # the last two have no effect
MESSAGE_KEYS = ("role", "content", "tool_calls", "function_call", "tool_call_id", "name", *REASONING)

# Arguments of ``apply_chat_template``, which cannot be names of template variables.
RESERVED_VARIABLES = {
    *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("tokenizer_kwargs", "return_assistant_tokens_mask", "sanitize_control_tokens"),
}


def to_empty_chat(row: RecordView) -> Chat:
    """Returns a chat with the record's tools, template variables and weight, but without messages."""
    raw_tools = [*row.parsed("tools", list), *row.parsed("functions", list)]
    tools = [_to_tool(tool, row, number=n) for n, tool in enumerate(raw_tools, start=1)]
    variables = dict(row.parsed("chat_template_kwargs", dict))
    if reserved := RESERVED_VARIABLES.intersection(variables):
        what = f"{row.name('chat_template_kwargs')}: {listed(reserved)} cannot be a template variable"
        raise row.error(what, fix="remove it")
    return Chat([], tools, variables, row.weight())


def to_messages(turns: Sequence[Any], row: RecordView, roles: Mapping[str, Role]) -> list[Message]:
    """Converts the turns of a record. ``roles`` maps the format's names of the roles."""
    return [_to_message(turn, row, number=n, roles=roles) for n, turn in enumerate(turns, start=1)]


def with_system(messages: list[Message], row: RecordView) -> list[Message]:
    """Prepends the system text that the record has in a separate key."""
    system = row.optional("system")
    if not system:
        return messages
    if messages[0]["role"] == "system":
        raise row.error(f"both {row.name('system')} and a system turn", fix="remove one of them")
    return [{"role": "system", "content": system}, *messages]


def checked_chat(messages: list[Message], row: RecordView, chat: Chat) -> Chat:
    """Returns the chat with these messages. The template decides which orders of turns are valid."""
    if not row.is_prompt and all(message["role"] != "assistant" for message in messages):
        raise row.error("no turn of role 'assistant'", got=f"{len(messages)} message(s)")
    return replace(chat, messages=messages)


def _to_message(turn: object, row: RecordView, *, number: int, roles: Mapping[str, Role]) -> Message:
    """Checks and converts a turn. Null counts as missing, since tables fill in every key of nested columns.

    Raises DataError for an unknown key: with a misspelt ``train``, the model would be trained on a turn that
    was meant to be skipped.
    """
    what = f"message {number}"
    fields = _filled(row.expect(dict, turn, what=what))
    row.check_keys(fields, (*MESSAGE_KEYS, *SWITCHES, *WEIGHT_NAMES), what=what)
    if "role" not in fields:
        raise row.error(f"{what} has no role", got=f"keys {listed(fields)}")
    role = _role(fields["role"], row, what=what, roles=roles)
    message: Message = {"role": role}
    if "content" in fields:
        message["content"] = _content(fields["content"], row, what=what, role=role)
    if reasoning := _reasoning(fields, row, what=what, role=role):
        message["reasoning"] = reasoning
    if calls := _tool_calls(fields, row, what=what, role=role):
        message["tool_calls"] = calls
    if "name" in fields:
        message["name"] = row.expect(str, fields["name"], what=f"{what}: name")
    if "tool_call_id" in fields:
        message["tool_call_id"] = row.expect(str, fields["tool_call_id"], what=f"{what}: tool_call_id")
    _check_content(message, row, what=what)
    weight = _turn_weight(fields, row, what=what, role=role)
    return message if role != "assistant" or weight == 1 else {**message, "weight": weight}


def _check_content(message: Message, row: RecordView, *, what: str) -> None:
    """Raises DataError if a turn has no content."""
    role, content = message["role"], message.get("content")
    if "tool_calls" in message or (role in ("system", "tool") and content is not None):
        return
    if content is None:
        raise row.error(f"{what} has no content", got=f"role {role}")
    if role == "assistant" and row.is_prompt:  # an earlier answer may have been empty
        return
    if role == "assistant" or not row.allow_empty_prompt:
        row.not_blank(content, f"{what} (role {role})")


def _turn_weight(fields: Record, row: RecordView, *, what: str, role: Role) -> float:
    """Returns the product of all weights and switches of a turn."""
    weight = 1.0
    for key in dict.fromkeys((*SWITCHES, *WEIGHT_NAMES)):
        if key not in fields:
            continue
        value, name = fields[key], f"{what}: {key!r}"
        if isinstance(value, bool) and key in SWITCHES:
            weight *= float(value is not (key == "masked"))
        elif key in WEIGHT_NAMES:
            weight *= row.number(value, what=name)
        else:
            raise row.error(f"{name}: expected true or false", got=repr(value))
        if role != "assistant" and weight != 0:
            raise row.error(
                f"{name} on a turn of role {role!r}", fix="only assistant turns can be trained on"
            )
    return weight


def _reasoning(fields: Record, row: RecordView, *, what: str, role: Role) -> str:
    by_key = {key: row.expect(str, fields[key], what=f"{what}: {key}") for key in REASONING if key in fields}
    texts = {text for text in by_key.values() if text.strip()}
    if len(texts) > 1:
        raise row.error(f"{what}: {listed(by_key)} differ", fix="keep one of them")
    if texts and role != "assistant":
        raise row.error(
            f"{what}: reasoning on a turn of role {role!r}", fix="only assistant turns can have reasoning"
        )
    return texts.pop() if texts else ""


def _tool_calls(fields: Record, row: RecordView, *, what: str, role: Role) -> list[ToolCall]:
    """Returns the tool calls of a turn in OpenAI's format, also from the legacy ``function_call``."""
    calls = fields.get("tool_calls") or []
    calls = row.from_json(calls, list, what=f"{what}: tool_calls")
    legacy = row.from_json(fields.get("function_call") or {}, dict, what=f"{what}: function_call")
    if (calls or legacy) and role != "assistant":
        fix = "only assistant turns can call tools"
        raise row.error(f"{what}: tool_calls on a turn of role {role!r}", fix=fix)
    if calls and legacy:
        raise row.error(
            f"{what} has both tool_calls and function_call", fix="remove function_call, the legacy name"
        )
    calls = [legacy] if legacy else calls
    return [_tool_call(call, row, what=f"{what}: tool call {n}") for n, call in enumerate(calls, start=1)]


def _tool_call(call: object, row: RecordView, *, what: str) -> ToolCall:
    fields = _filled(row.expect(dict, call, what=what))
    function = _filled(row.expect(dict, fields.get("function", fields), what=f"{what}: function"))
    outer = CALL_KEYS if "function" in fields else (*CALL_KEYS, *FUNCTION_KEYS)
    row.check_keys(fields, outer, what=what)
    row.check_keys(function, FUNCTION_KEYS if "function" in fields else outer, what=what)
    name = row.expect(str, function.get("name"), what=f"{what}: name")
    if "arguments" in function and "parameters" in function:
        raise row.error(f"{what} has both arguments and parameters", fix="remove one of them")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(row.from_json(arguments, dict, what=f"{what}: arguments"), Mapping):
        arguments = arguments if isinstance(arguments, str) else dict(arguments)
    result: ToolCall = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**result, "id": row.expect(str, fields["id"], what=f"{what}: id")} if "id" in fields else result


def _is_parts(content: object) -> bool:
    """Whether a content is OpenAI's list of parts, not a tool's result."""
    if not isinstance(content, list) or not content:
        return False
    return all(isinstance(part, Mapping) and "type" in part for part in content)


def _role(given: object, row: RecordView, *, what: str, roles: Mapping[str, Role]) -> Role:
    name = row.expect(str, given, what=f"{what}: role")
    if name not in roles:
        hint = did_you_mean(name, roles).removeprefix("; ")
        choices = ", ".join(list(roles)[:4])
        fix = f"use one of {choices}" + (f" ({hint})" if hint else "")
        raise row.error(f"{what} has unknown role {name!r}", fix=fix)
    return roles[name]


def _content(content: object, row: RecordView, *, what: str, role: Role) -> str:
    """Returns the text of a turn, given as text, as OpenAI's list of text parts or, for a tool, as JSON."""
    if role == "tool" and not isinstance(content, str) and not _is_parts(content):
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, list):
        return row.expect(str, content, what=f"{what}: content")
    for part in content:
        kind = row.expect(dict, part, what=f"{what}: content part").get("type")
        if kind != "text":
            raise row.error(f"{what}: content of type {kind!r} is not supported", fix="use type 'text'")
        row.check_keys(_filled(part), PART_KEYS, what=f"{what}: content part")
    return "".join(
        row.expect(str, part.get("text"), what=f"{what}: text of a content part") for part in content
    )


def _to_tool(tool: Any, row: RecordView, *, number: int) -> dict[str, Json]:
    """Returns a tool in the form for templates: ``{"type": "function", "function": {"name": ...}}``.

    Removes nulls, since tables fill in every key of nested columns.
    """
    fields = _without_nulls(row.expect(dict, tool, what=f"tool {number}"))
    function = fields.get("function", fields)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise row.error(f"tool {number} has no name", got=f"keys {listed(fields)}")
    return fields if "function" in fields else {"type": "function", "function": fields}


def _filled(fields: Record) -> dict[str, Any]:
    """Returns the keys that have a value, since tables have every key in each row."""
    return {key: value for key, value in fields.items() if value is not None}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
