"""The turns of a chat: their roles, contents, calls, reasoning and weights, checked one by one.

No key of a message is ignored. What OpenAI's format leaves open is brought to one form here, so that
templates and the certificate see one kind of message.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_clm.data.read.row import Record, Row, listed
from hf_clm.errors import did_you_mean
from hf_clm.schema import Chat, Json, Message, Role, ToolCall

# A format's names for the roles; the first four are the ones to advise.
OPENAI_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "developer": "system", "function": "tool",
}  # fmt: skip
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "gpt": "assistant", "tool": "tool", "user": "user",
    "assistant": "assistant", "function_call": "assistant", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip

# The spellings of what other tools call a message's weight. ``masked`` says the opposite of the others.
SWITCHES = ("train", "training", "loss", "masked")
WEIGHTS = ("weight", "loss_weight", "loss")
REASONING = ("reasoning", "reasoning_content", "thinking")
CALL_KEYS, FUNCTION_KEYS = ("type", "id", "index", "function"), ("name", "arguments", "parameters")
PART_KEYS = ("type", "text", "cache_control", "annotations")  # the last two say nothing of what is learned
MESSAGE_KEYS = ("role", "content", "tool_calls", "function_call", "tool_call_id", "name", *REASONING)

# Arguments of ``apply_chat_template`` that no variable of a template may be called.
RESERVED = {
    *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("tokenizer_kwargs", "return_assistant_tokens_mask", "sanitize_control_tokens"),
}


def to_empty_chat(row: Row) -> Chat:
    """A chat without messages yet: the record's tools, template variables and weight."""
    given = [*row.parsed("tools", list), *row.parsed("functions", list)]
    tools = [_to_tool(tool, row, number=n) for n, tool in enumerate(given, start=1)]
    variables = dict(row.parsed("chat_template_kwargs", dict))
    if reserved := RESERVED.intersection(variables):
        what = f"{row.name('chat_template_kwargs')}: {listed(reserved)} is not a variable of a template"
        raise row.error(what, fix="remove it")
    return Chat([], tools, variables, row.weight())


def to_messages(turns: Sequence[Any], row: Row, roles: Mapping[str, Role]) -> list[Message]:
    """The turns of a record; ``roles`` are its format's names for them."""
    return [_to_message(turn, row, number=n, roles=roles) for n, turn in enumerate(turns, start=1)]


def with_system(messages: list[Message], row: Row) -> list[Message]:
    """The messages after the system text that the record holds beside them."""
    system = row.optional("system")
    if not system:
        return messages
    if messages[0]["role"] == "system":
        raise row.error(f"{row.name('system')} and a system turn", fix="remove one of them")
    return [{"role": "system", "content": system}, *messages]


def checked_chat(messages: list[Message], row: Row, chat: Chat) -> Chat:
    """The chat with these messages. The order of turns is for the template to judge."""
    if not row.is_prompt and all(message["role"] != "assistant" for message in messages):
        raise row.error("no turn of role 'assistant'", got=f"{len(messages)} message(s)")
    return replace(chat, messages=messages)


def _to_message(turn: Any, row: Row, *, number: int, roles: Mapping[str, Role]) -> Message:
    """One turn, checked. A null counts as missing, since a table fills in every key of a nested column.

    Raises DataError for an unknown key: a misspelt ``train`` would teach the model the very turn that it was
    meant to skip.
    """
    what = f"message {number}"
    given = _filled(row.expect(dict, turn, what=what))
    row.check_keys(given, (*MESSAGE_KEYS, *SWITCHES, *WEIGHTS), what=what)
    if "role" not in given:
        raise row.error(f"{what} has no role", got=f"keys {listed(given)}")
    role = _role(given["role"], row, what=what, roles=roles)
    message: Message = {"role": role}
    if "content" in given:
        message["content"] = _content(given["content"], row, what=what, role=role)
    if reasoning := _reasoning(given, row, what=what, role=role):
        message["reasoning"] = reasoning
    if calls := _tool_calls(given, row, what=what, role=role):
        message["tool_calls"] = calls
    if "name" in given:
        message["name"] = row.expect(str, given["name"], what=f"{what}: name")
    if "tool_call_id" in given:
        message["tool_call_id"] = row.expect(str, given["tool_call_id"], what=f"{what}: tool_call_id")
    _check_content(message, row, what=what)
    weight = _turn_weight(given, row, what=what, role=role)
    return message if role != "assistant" or weight == 1 else {**message, "weight": weight}


def _check_content(message: Message, row: Row, *, what: str) -> None:
    """Raises DataError for a turn without content."""
    role, content = message["role"], message.get("content")
    if "tool_calls" in message or (role in ("system", "tool") and content is not None):
        return
    if content is None:
        raise row.error(f"{what} has no content", got=f"role {role}")
    if role == "assistant" and row.is_prompt:  # an earlier answer may have been empty
        return
    if role == "assistant" or not row.allow_empty_prompt:
        row.not_blank(content, f"{what} (role {role})")


def _turn_weight(given: Record, row: Row, *, what: str, role: Role) -> float:
    """What the known spellings say of a turn together; they multiply."""
    weight = 1.0
    for key in dict.fromkeys((*SWITCHES, *WEIGHTS)):
        if key not in given:
            continue
        value, name = given[key], f"{what}: {key!r}"
        if isinstance(value, bool) and key in SWITCHES:
            weight *= float(value is not (key == "masked"))
        elif key in WEIGHTS:
            weight *= row.number(value, what=name)
        else:
            raise row.error(f"{name}: expected true or false", got=repr(value))
        if role != "assistant" and weight != 0:
            raise row.error(f"{name} on a turn of role {role!r}", fix="only assistant turns are learned")
    return weight


def _reasoning(given: Record, row: Row, *, what: str, role: Role) -> str:
    found = {key: row.expect(str, given[key], what=f"{what}: {key}") for key in REASONING if key in given}
    texts = {text for text in found.values() if text.strip()}
    if len(texts) > 1:
        raise row.error(f"{what}: {listed(found)} differ", fix="keep one of them")
    if texts and role != "assistant":
        raise row.error(f"{what}: reasoning on a turn of role {role!r}", fix="only an assistant reasons")
    return texts.pop() if texts else ""


def _tool_calls(given: Record, row: Row, *, what: str, role: Role) -> list[ToolCall]:
    """The calls of a turn in OpenAI's form; ``function_call`` is its older spelling of a single one."""
    calls = given.get("tool_calls") or []
    calls = row.from_json(calls, list, what=f"{what}: tool_calls")
    older = row.from_json(given.get("function_call") or {}, dict, what=f"{what}: function_call")
    if (calls or older) and role != "assistant":
        raise row.error(f"{what}: tool_calls on a turn of role {role!r}", fix="only an assistant calls tools")
    if calls and older:
        raise row.error(
            f"{what} has tool_calls and function_call", fix="remove function_call, the older name"
        )
    calls = [older] if older else calls
    return [_tool_call(call, row, what=f"{what}: tool call {n}") for n, call in enumerate(calls, start=1)]


def _tool_call(call: Any, row: Row, *, what: str) -> ToolCall:
    given = _filled(row.expect(dict, call, what=what))
    function = _filled(row.expect(dict, given.get("function", given), what=f"{what}: function"))
    outer = CALL_KEYS if "function" in given else (*CALL_KEYS, *FUNCTION_KEYS)
    row.check_keys(given, outer, what=what)
    row.check_keys(function, FUNCTION_KEYS if "function" in given else outer, what=what)
    name = row.expect(str, function.get("name"), what=f"{what}: name")
    if "arguments" in function and "parameters" in function:
        raise row.error(f"{what} has arguments and parameters", fix="remove one of them")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(row.from_json(arguments, dict, what=f"{what}: arguments"), Mapping):
        arguments = arguments if isinstance(arguments, str) else dict(arguments)
    found: ToolCall = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**found, "id": row.expect(str, given["id"], what=f"{what}: id")} if "id" in given else found


def _is_parts(content: Any) -> bool:
    """Whether a content is OpenAI's list of parts, and not a tool's result."""
    is_list = isinstance(content, list) and bool(content)
    return is_list and all(isinstance(part, Mapping) and "type" in part for part in content)


def _role(name: Any, row: Row, *, what: str, roles: Mapping[str, Role]) -> Role:
    if row.expect(str, name, what=f"{what}: role") not in roles:
        hint = did_you_mean(name, roles).removeprefix("; ")
        advised = ", ".join(list(roles)[:4])
        raise row.error(f"{what} has role {name!r}", fix=f"one of {advised}" + (f" ({hint})" if hint else ""))
    return roles[name]


def _content(content: Any, row: Row, *, what: str, role: Role) -> str:
    """The text of a turn, given as such, as OpenAI's list of text parts, or (of a tool) as JSON."""
    if role == "tool" and not isinstance(content, str) and not _is_parts(content):
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, list):
        return row.expect(str, content, what=f"{what}: content")
    for part in content:
        kind = row.expect(dict, part, what=f"{what}: content part").get("type")
        if kind != "text":
            raise row.error(f"{what}: content of type {kind!r} is not supported", fix="only text is")
        row.check_keys(_filled(part), PART_KEYS, what=f"{what}: content part")
    return "".join(
        row.expect(str, part.get("text"), what=f"{what}: text of a content part") for part in content
    )


def _to_tool(tool: Any, row: Row, *, number: int) -> dict[str, Json]:
    """A tool as templates expect it: ``{"type": "function", "function": {"name": ...}}``.

    Nulls are left out: a table fills in every key of a nested column.
    """
    given = _without_nulls(row.expect(dict, tool, what=f"tool {number}"))
    function = given.get("function", given)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise row.error(f"tool {number} has no name", got=f"keys {listed(given)}")
    return given if "function" in given else {"type": "function", "function": given}


def _filled(given: Record) -> dict[str, Any]:
    """The keys that have a value: a table has every key in each row."""
    return {key: value for key, value in given.items() if value is not None}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
