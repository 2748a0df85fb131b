"""Checks the rows of chats: the prompt of each turn must be the one that transformers renders."""

import json
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple, cast

import numpy as np
from jinja2 import TemplateError

from hf_clm.data.label.labels import Fate
from hf_clm.data.label.render import APART
from hf_clm.data.proof.texts import HALF_LETTER, Assembled, Failed, Texts, squeezed
from hf_clm.schema import Chat, Message, ToolCall, short_call_id


class Spelling(NamedTuple):
    """Details that OpenAI's format leaves open and that differ between templates."""

    in_content: bool
    parts: bool
    arguments_as_text: bool
    empty_content: bool
    short_ids: bool


class ChatChecker:
    """Compares rows with the turns of their chats."""

    def __init__(self, texts: Texts):
        self.texts = texts

    def check(
        self, chat: Chat, row: Assembled, texts: list[str], fate: Fate, *, proves: bool
    ) -> Iterator[Failed]:
        """Yields the failures of a chat's row, whose spans decode to ``texts``."""
        if self.texts.learns_all:
            if not self._is_whole(chat, "".join(texts), row, proves=proves):
                yield "targets", "the conversation as the template writes it", repr(texts[-1][-60:])
            yield from self._check_weighted(chat, row, texts, proves=proves)
            return
        turns = self._target_turns(chat, row, texts, fate)
        if len(turns) != len(row.targets):
            expected = f"{len(self._trained_turns(chat))} turns with a label"
            yield "targets", expected, f"{len(row.targets)}, the last {texts[-1][-60:]!r}"
            return
        earlier = [number for number in self._trained_turns(chat) if number < min(turns, default=0)]
        after = -1 if APART in fate.reason else max(earlier, default=-1)
        for message, at in zip(turns, row.targets, strict=True):
            start, stop, weight = row.stretches[at]
            is_cut = (row.starts_late and start <= 1) or (row.ends_early and stop == len(row.ids))
            expected_weight = chat.messages[message].get("weight", 1.0) * chat.weight
            if not is_cut and not self._says(chat, message, texts[at]):
                yield "targets", f"message {message + 1}", repr(texts[at][-60:])
            elif not is_cut and row.ids[stop - 1] not in self.texts.stop_ids:
                yield self.texts.no_stop(row.ids[stop - 1])
            elif np.float32(expected_weight) != np.float32(weight):
                yield "weights", f"{expected_weight:g}", f"{weight:g}"
            elif proves and not (row.starts_late and start <= 1):
                yield from self._prove_turn(chat, message, row, at, text=texts[at], after=after)

    def _check_weighted(
        self, chat: Chat, row: Assembled, texts: list[str], *, proves: bool
    ) -> Iterator[Failed]:
        """Checks weights if the whole chat is a target: only turns with a weight may differ from 1."""
        if row.starts_late or row.ends_early:  # the turns in a piece are not known here
            return
        expected = [
            (number, message.get("weight", 1.0) * chat.weight)
            for number, message in enumerate(chat.messages)
            if number and message.get("weight", 1.0) != 1
        ]
        others = [at for at, stretch in enumerate(row.stretches) if stretch[2] != np.float32(chat.weight)]
        if len(others) != len(expected):
            yield "weights", f"{len(expected)} turns with another weight", f"{len(others)}"
            return
        for (number, weight), at in zip(expected, others, strict=True):
            if np.float32(weight) != np.float32(row.stretches[at][2]):
                yield "weights", f"message {number + 1} with weight {weight:g}", f"{row.stretches[at][2]:g}"
            elif not self._says(chat, number, texts[at]):
                yield "targets", f"message {number + 1}", repr(texts[at][-60:])
            elif proves:
                yield from self._prove_turn(chat, number, row, at, text=texts[at], after=-1)

    def _target_turns(self, chat: Chat, row: Assembled, texts: list[str], fate: Fate) -> list[int]:
        """Returns the messages to which the targets of a row belong."""
        trained, count = self._trained_turns(chat), len(row.targets)
        if row.starts_late:  # a piece of a split chat: find the turns by their text
            matches = [[n for n in trained if self._says(chat, n, texts[at])] for at in row.targets]
            return [numbers[0] if numbers else trained[0] for numbers in matches]
        if APART not in fate.reason:
            return trained[:count] if row.ends_early else trained[-count:] if fate.kind == "cut" else trained
        if fate.kind == "used":
            return trained[row.at : row.at + 1]
        at = row.targets[0] if row.targets else 0
        return [n for n in trained if self._says(chat, n, texts[at])][:1]

    def _trained_turns(self, chat: Chat) -> list[int]:
        """Returns the numbers of the messages that are targets."""
        turns = [n for n, message in enumerate(chat.messages) if n and message["role"] == "assistant"]
        turns = turns[-1:] if self.texts.options.train_on.turns == "last" else turns
        return [number for number in turns if chat.messages[number].get("weight", 1.0) > 0]

    def _says(self, chat: Chat, number: int, text: str) -> bool:
        """Whether a decoded target contains the reasoning, content and tool calls of its message."""
        message = self._without_end(chat.messages[number])
        parts = [message.get("content", "").rpartition("</think>")[2]]
        if self.texts.options.train_on.reasoning and self.texts.options.reasoning != "drop":
            parts.append(message.get("reasoning", ""))
        for call in message.get("tool_calls", []):
            arguments = call["function"]["arguments"]
            values = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
            strings = [value for value in values.values() if isinstance(value, str)]
            parts += [call["function"]["name"], *strings]
        decoded = squeezed(self.texts.normalized(text)).replace("\\", "")  # ignores escaped quotes
        forms = [(part, json.dumps(part), json.dumps(part, ensure_ascii=False)) for part in parts]
        return all(any(self._bare(form) in decoded for form in spellings) for spellings in forms)

    def _bare(self, text: str) -> str:
        return squeezed(self.texts.normalized(text.strip().strip('"'))).replace("\\", "")

    def _prove_turn(
        self, chat: Chat, number: int, row: Assembled, at: int, *, text: str, after: int
    ) -> Iterator[Failed]:
        """Checks that transformers renders the ids before a target as its prompt, and the target's text.

        A chat that was cut may begin at any user turn after message ``after``.
        """
        target, wrong = row.stretches[at], None
        systems = next((n for n, m in enumerate(chat.messages) if m["role"] != "system"), 0)
        users = [n for n in range(systems + 1, number) if chat.messages[n]["role"] == "user" and n > after]
        for first in (systems, *users):
            messages = [*chat.messages[:systems], *chat.messages[first : number + 1]]
            for spelling in self._alternatives(messages):
                prompt = self._apply(chat, spelling[:-1], add_generation_prompt=True)
                before = Chat(messages[:-1], chat.tools)
                if prompt is None or not self._is_prompt(before, prompt, row, target[0]):
                    continue
                full = self._apply(chat, spelling, add_generation_prompt=False) or ""
                is_cut = row.ends_early and target[1] == len(row.ids)
                if full.startswith(prompt) and not is_cut and not self._is_rest(full[len(prompt) :], text):
                    wrong = wrong or ("targets", repr(full[len(prompt) :][-60:]), repr(text[-60:]))
                    continue  # another spelling may have its reasoning in the content
                yield from self._check_controls(Chat(messages[-1:]), text, row.ids[target[0] : target[1]])
                return
        yield wrong or ("prompt", f"the generation prompt of message {number + 1}", repr(text[:60]))

    def _is_prompt(self, chat: Chat, text: str, row: Assembled, start: int) -> bool:
        before = row.ids[:start]
        if self.texts.spelled(chat):  # transformers would not encode its control tokens as plain text
            decoded = self.texts.backend.decode(before, skip_special_tokens=False)
            actual, prompt = self.texts.loosened(decoded), self.texts.loosened(self.texts.normalized(text))
            has_reasoning = not self.texts.options.train_on.reasoning and actual.startswith(prompt)
            is_same = actual == prompt or has_reasoning
            return is_same and not any(self._check_controls(chat, decoded, before))
        ids = cast(list[int], self.texts.tokenizer(text, add_special_tokens=False)["input_ids"])
        if row.starts_late:
            return ids[-len(before) :] == before
        # reasoning that is not trained on follows the prompt
        return before == ids or (not self.texts.options.train_on.reasoning and before[: len(ids)] == ids)

    def _check_controls(self, chat: Chat, text: str, ids: list[int]) -> Iterator[Failed]:
        """Checks that control tokens in a record's text were not encoded as control tokens."""
        expected = len(self.texts.pattern.findall(text)) - len(self.texts.spelled(chat))
        count = self.texts.count_controls(ids)
        if count != expected:
            yield "control", f"{expected} control tokens", str(count)

    def _is_rest(self, rest: str, target: str) -> bool:
        """Whether a target is the template's text after the prompt, up to the turn's last token."""
        rest, target = self.texts.loosened(self.texts.normalized(rest)), self.texts.loosened(target)
        if not self.texts.options.train_on.reasoning:  # the target begins after the reasoning
            return target in rest or target.removesuffix(self.texts.eos) in rest
        return rest.startswith(target) or rest.rstrip() == target.removesuffix(self.texts.eos)

    def _is_whole(self, chat: Chat, text: str, row: Assembled, *, proves: bool) -> bool:
        """Whether a conversation that is a target as a whole equals the template's text."""
        decoded = squeezed(text.strip(HALF_LETTER))
        for spelling in self._alternatives(chat.messages) if proves else ():
            full = self._apply(chat, spelling, add_generation_prompt=False) or ""
            full = squeezed(self.texts.normalized(full))
            if decoded == full or (row.ends_early and full.startswith(decoded)):
                return True
            if row.starts_late and decoded in full:
                return True
        return not proves

    def _apply(self, chat: Chat, messages: list[Any], *, add_generation_prompt: bool) -> str | None:
        """Renders with transformers; returns None if the template does not accept the messages."""
        template: Any = self.texts.tokenizer
        for tools in (chat.tools or None, chat.tools):
            try:
                return template.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **chat.template_kwargs,
                )
            except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
                continue
        return None

    def _alternatives(self, messages: Sequence[Any]) -> Iterator[list[dict[str, Any]]]:
        """Yields the messages in the variants that templates expect, the most common one first."""
        has_calls = any("tool_calls" in message for message in messages)
        has_reasoning = any("reasoning" in message for message in messages)
        both, one = (False, True), (False,)
        of_calls = both if has_calls else one
        in_content = both if has_reasoning and self.texts.options.reasoning != "drop" else one
        cleaned = list(map(self._without_end, messages))
        for choice in product(in_content, both, of_calls, of_calls, of_calls):
            yield [_spell(message, Spelling(*choice)) for message in cleaned]

    def _without_end(self, message: Any) -> Any:
        """Removes an end token that a record's answer contains."""
        content, ends = message.get("content", "").rstrip(), (self.texts.eos, *self.texts.special)
        end = next((token for token in ends if content.endswith(token)), None)
        if message["role"] != "assistant" or end is None:
            return message
        return {**message, "content": content.removesuffix(end)}


def _spell(message: Message, spelling: Spelling) -> dict[str, Any]:
    """Returns a message in a variant that a template may expect."""
    entry: dict[str, Any] = {
        key: value for key, value in message.items() if key not in ("weight", "reasoning")
    }
    reasoning = message.get("reasoning")
    if reasoning and spelling.in_content:
        entry["content"] = f"<think>\n{reasoning}\n</think>\n\n{message.get('content', '')}"
    elif reasoning:
        entry |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), reasoning)
    if spelling.empty_content:
        entry.setdefault("content", "")
    if spelling.parts and "content" in entry:
        entry["content"] = [{"type": "text", "text": entry["content"]}]
    if "tool_calls" in entry:
        calls = [_spell_call(call, as_text=spelling.arguments_as_text) for call in entry["tool_calls"]]
        entry["tool_calls"] = calls
    if spelling.short_ids:
        for part in (entry, *entry.get("tool_calls", [])):
            part.update({key: short_call_id(part[key]) for key in ("id", "tool_call_id") if key in part})
    return entry


def _spell_call(call: ToolCall, *, as_text: bool) -> dict[str, Any]:
    """Returns a tool call with its arguments as an object or as JSON text."""
    arguments = call["function"]["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not as_text and isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return {**call, "function": {**call["function"], "arguments": arguments}}
