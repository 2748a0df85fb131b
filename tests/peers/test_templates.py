"""Chats in every chat template that TRL's wheel holds, against transformers' own rendering of each.

A template takes a chat if it renders it and shows all of its parts. Then the ids before each target are those
of ``apply_chat_template(messages[:k], add_generation_prompt=True)``, the target holds what the turn says and
ends in a token that generation stops at, and the certificate is valid. What is refused is listed with why.
"""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from helpers import X, byte_tokenizer
from jinja2 import TemplateError

from hf_clm.data.label.datasets import SFTDataset
from hf_clm.data.label.render import LabelOptions
from hf_clm.data.proof.certificate import certify
from hf_clm.errors import UserError
from hf_clm.schema import Chat
from hf_clm.text.chat import stop_token_ids

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.peer

TEMPLATES = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
CONTROL_TOKEN = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?[a-z_:]{1,20}>|\[/?[A-Z_]{2,20}\]|<[a-z_]+\|>|<\|[a-z_]+>"
)
ORDINARY_TAG = re.compile(r"(?!</?s>|<bos>|<eos>)</?[a-z_:]+>")  # <think>, <tool_call>: special=False
REASONING = ("reasoning_content", "reasoning", "thinking")  # the names under which templates read it

Q1, A1 = {"role": "user", "content": "hello q1"}, {"role": "assistant", "content": "answer1"}
Q2, A2 = {"role": "user", "content": "more q2"}, {"role": "assistant", "content": "answer2"}
FUNCTION = {"name": "get_weather", "arguments": {"city": "Berlin"}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "id": "call_1234", "function": FUNCTION}]}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call_1234", "content": "sunny"}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}}
TOOL = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": CITY | {"required": ["city"]},
}

CLOSED_BLOCK = re.compile(r"(</[a-z:]*think>|<channel\|>|<\|END_THINKING\|>|\[/THINK\])\s*$")

CHATS: dict[str, Any] = {
    "one turn": Chat([Q1, A1]),
    "two turns": Chat([Q1, A1, Q2, A2]),
    "reasoning": Chat([Q1, A1 | {"reasoning": "my thoughts"}]),
    "reasoning, switched on": Chat(
        [Q1, A1 | {"reasoning": "my thoughts"}], template_kwargs={"enable_thinking": True}
    ),
    "tool call": Chat([Q1, CALL, RESULT, A2], [{"type": "function", "function": TOOL}]),
}
SAID = {  # what the target of each assistant turn holds
    "one turn": [["answer1"]],
    "two turns": [["answer1"], ["answer2"]],
    "reasoning": [["my thoughts", "answer1"]],
    "reasoning, switched on": [["my thoughts", "answer1"]],
    "tool call": [["get_weather", "city", "Berlin"], ["answer2"]],
}


def tokenizer_for(template: str) -> Any:
    """A token for each byte, and one for each control token that the template writes."""
    tokenizer = byte_tokenizer()
    tokens = sorted({"<s>", *CONTROL_TOKEN.findall(template)})
    tokenizer.add_tokens([token for token in tokens if ORDINARY_TAG.fullmatch(token)])
    special = [token for token in tokens if not ORDINARY_TAG.fullmatch(token)]
    tokenizer.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = template
    return tokenizer


def render(tokenizer: Any, messages: list[Any], chat: Chat, **options: Any) -> Any:
    options |= chat.template_kwargs
    return tokenizer.apply_chat_template(messages, tools=chat.tools or None, return_dict=False, **options)


def forms(messages: list[Any]) -> Iterator[list[Any]]:
    """The messages with contents as texts or parts, and arguments as objects or JSON text."""
    for has_parts in (False, True):
        for has_text in (False, True):
            shown = deepcopy(messages)
            for message in shown:
                if has_parts and "content" in message:
                    message["content"] = [{"type": "text", "text": message["content"]}]
                for call in message.get("tool_calls", []) if has_text else []:
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
                if "reasoning" in message:
                    message |= dict.fromkeys(REASONING, message["reasoning"])
            yield shown


def form_that_is_taken(tokenizer: Any, chat: Chat) -> list[Any] | None:
    """The first form that the template renders with every content, reasoning and call; None for none.

    Reasoning has no place after a prompt that closes the block: Qwen3.5 without ``enable_thinking``.
    """
    for shown in forms(chat.messages):
        others: Any = deepcopy(shown)
        for message in others:
            message |= {name: "another thought" for name in REASONING if name in message}
            for call in message.get("tool_calls", []):
                call["function"]["name"] = "another_function"
        try:
            text = render(tokenizer, shown, chat, tokenize=False)
            other = render(tokenizer, others, chat, tokenize=False)
            asked = render(tokenizer, shown[:-1], chat, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            continue
        has_place = "reasoning" not in shown[-1] or not CLOSED_BLOCK.search(asked)
        shows_all = all(message.get("content", "") in text for message in chat.messages)
        if has_place and shows_all and (other != text or others == shown):
            return shown
    return None


def prompts_and_targets(dataset: SFTDataset) -> tuple[list[list[int]], list[list[int]]]:
    """The ids before each target, and those of it."""
    prompts, targets = [], []
    for row in dataset:
        before = X
        for at, label in enumerate(row["labels"]):
            if label != X and before == X:
                prompts.append(row["input_ids"][:at])
                targets.append([])
            if label != X:
                targets[-1].append(label)
            before = label
    return prompts, targets


def faults(tokenizer: Any, chat: Chat, shown: list[Any], said: list[list[str]]) -> Iterator[str]:
    """What is wrong with the rows of a chat, or why it is refused."""
    try:
        dataset, stops = SFTDataset([chat], tokenizer), stop_token_ids(tokenizer)
    except UserError as error:
        yield f"refused: {error}"
        return
    prompts, targets = prompts_and_targets(dataset)
    turns = [number for number, message in enumerate(shown) if message["role"] == "assistant"]
    asked = [render(tokenizer, shown[:turn], chat, add_generation_prompt=True) for turn in turns]
    if prompts != asked:
        texts = [[tokenizer.decode(ids) for ids in each] for each in (prompts, asked)]
        yield f"prompts: {texts[0]}, and generation has {texts[1]}"
        return
    texts = [tokenizer.decode(target) for target in targets]
    for prompt, text, parts in zip(map(tokenizer.decode, prompts), texts, said, strict=True):
        if missing := [part for part in parts if part not in text]:
            yield f"target: {text!r} does not hold {missing}"
        if CLOSED_BLOCK.search(prompt + text.partition(parts[0])[0]) and parts[0] == "my thoughts":
            yield f"reasoning: {text!r} thinks after a block that is closed: {prompt[-40:]!r}"
    if any(target[-1] not in stops for target in targets):
        yield f"stop: {texts} do not end in one of {tokenizer.convert_ids_to_tokens(stops)}"
    proof = certify(dataset.rows, [chat], tokenizer=tokenizer, options=LabelOptions(), stop_ids=stops)
    yield from (f"certificate: {f.check}: expected {f.expected}, got {f.got}" for f in proof.failures)


@pytest.mark.parametrize(
    ("kind", "at_least"),
    [
        ("one turn", 60),
        ("two turns", 60),
        ("reasoning", 25),
        ("reasoning, switched on", 20),
        ("tool call", 35),
    ],
)
def test_nearly_every_template_that_takes_a_chat_trains_what_generation_is_asked(kind, at_least):
    taken, offenders = 0, []
    for path in TEMPLATES:
        template = path.read_text(encoding="utf-8")
        if any(name not in template for name in CHATS[kind].template_kwargs):
            continue
        tokenizer = tokenizer_for(template)
        if (shown := form_that_is_taken(tokenizer, CHATS[kind])) is None:
            continue
        taken += 1
        if found := [*faults(tokenizer, CHATS[kind], shown, SAID[kind])]:
            offenders.append(f"{path.name}: {'; '.join(found)}")
    lines = "\n".join([f"{kind}: {taken - len(offenders)} of {taken} templates", *offenders])
    print(lines)

    assert taken >= at_least, lines
    assert len(offenders) <= 0.05 * taken, lines
