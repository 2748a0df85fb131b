"""Proves the rows of chats: each prompt is the one that transformers itself gives for its turn."""

import json
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple, cast

import numpy as np
from jinja2 import TemplateError

from hf_clm.data.label.labels import Fate
from hf_clm.data.label.render import APART
from hf_clm.data.proof.texts import HALF_LETTER, Assembled, Failed, Texts, squeezed
from hf_clm.schema import Chat, short_call_id


class Spelling(NamedTuple):
    """What OpenAI's format leaves open, and templates expect one way or the other."""

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
        """What is wrong with a row of a chat, whose stretches decode to ``texts``."""
        if self.texts.learns_all:
            if not self._is_whole(chat, "".join(texts), row, proves=proves):
                yield "targets", "the conversation as the template writes it", repr(texts[-1][-60:])
            yield from self._check_weighted(chat, row, texts, proves=proves)
            return
        chosen = self._chosen(chat, row, texts, fate)
        if len(chosen) != len(row.targets):
            learned = f"{len(self._learned(chat))} learned turns"
            yield "targets", learned, f"{len(row.targets)}, the last {texts[-1][-60:]!r}"
            return
        earlier = [number for number in self._learned(chat) if number < min(chosen, default=0)]
        after = -1 if APART in fate.reason else max(earlier, default=-1)
        for message, at in zip(chosen, row.targets, strict=True):
            start, stop, weight = row.stretches[at]
            is_cut = (row.starts_late and start <= 1) or (row.ends_early and stop == len(row.ids))
            expected = chat.messages[message].get("weight", 1.0) * chat.weight
            if not is_cut and not self._says(chat, message, texts[at]):
                yield "targets", f"message {message + 1}", repr(texts[at][-60:])
            elif not is_cut and row.ids[stop - 1] not in self.texts.stop_ids:
                yield self.texts.no_stop(row.ids[stop - 1])
            elif np.float32(expected) != np.float32(weight):
                yield "weights", f"{expected:g}", f"{weight:g}"
            elif proves and not (row.starts_late and start <= 1):
                yield from self._prove_turn(chat, message, row, at, told=texts[at], after=after)

    def _check_weighted(
        self, chat: Chat, row: Assembled, texts: list[str], *, proves: bool
    ) -> Iterator[Failed]:
        """Where all of a chat is learned: only the turns with a weight of their own have another one."""
        if row.starts_late or row.ends_early:  # which turns are in a piece is not told here
            return
        expected = [
            (number, message.get("weight", 1.0) * chat.weight)
            for number, message in enumerate(chat.messages)
            if number and message.get("weight", 1.0) != 1
        ]
        others = [at for at, stretch in enumerate(row.stretches) if stretch[2] != np.float32(chat.weight)]
        if len(others) != len(expected):
            yield "weights", f"{len(expected)} turns with a weight of their own", f"{len(others)}"
            return
        for (number, weight), at in zip(expected, others, strict=True):
            if np.float32(weight) != np.float32(row.stretches[at][2]):
                yield "weights", f"message {number + 1} with weight {weight:g}", f"{row.stretches[at][2]:g}"
            elif not self._says(chat, number, texts[at]):
                yield "targets", f"message {number + 1}", repr(texts[at][-60:])
            elif proves:
                yield from self._prove_turn(chat, number, row, at, told=texts[at], after=-1)

    def _chosen(self, chat: Chat, row: Assembled, texts: list[str], fate: Fate) -> list[int]:
        """The messages that the targets of a row are of."""
        learned, count = self._learned(chat), len(row.targets)
        if row.starts_late:  # a piece of a split chat: whichever turns say it
            said = [[n for n in learned if self._says(chat, n, texts[at])] for at in row.targets]
            return [numbers[0] if numbers else learned[0] for numbers in said]
        if APART not in fate.reason:
            return learned[:count] if row.ends_early else learned[-count:] if fate.kind == "cut" else learned
        if fate.kind == "used":
            return learned[row.at : row.at + 1]
        at = row.targets[0] if row.targets else 0
        return [n for n in learned if self._says(chat, n, texts[at])][:1]

    def _learned(self, chat: Chat) -> list[int]:
        """The numbers of the messages that are learned."""
        turns = [n for n, message in enumerate(chat.messages) if n and message["role"] == "assistant"]
        turns = turns[-1:] if self.texts.options.train_on.turns == "last" else turns
        return [number for number in turns if chat.messages[number].get("weight", 1.0) > 0]

    def _says(self, chat: Chat, number: int, text: str) -> bool:
        """Whether a decoded target says what its message does: reasoning, content and calls."""
        message = self._without_end(chat.messages[number])
        parts = [message.get("content", "").rpartition("</think>")[2]]
        if self.texts.options.train_on.reasoning and self.texts.options.reasoning != "drop":
            parts.append(message.get("reasoning", ""))
        for call in message.get("tool_calls", []):
            arguments = call["function"]["arguments"]
            values = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
            strings = [value for value in values.values() if isinstance(value, str)]
            parts += [call["function"]["name"], *strings]
        told = squeezed(self.texts.normalized(text)).replace("\\", "")  # a quote that a template has escaped
        forms = [(part, json.dumps(part), json.dumps(part, ensure_ascii=False)) for part in parts]
        return all(any(self._bare(form) in told for form in known) for known in forms)

    def _bare(self, text: str) -> str:
        return squeezed(self.texts.normalized(text.strip().strip('"'))).replace("\\", "")

    def _prove_turn(
        self, chat: Chat, number: int, row: Assembled, at: int, *, told: str, after: int
    ) -> Iterator[Failed]:
        """Whether transformers itself gives the ids before a target as its prompt, and the target's text.

        Of a chat that was cut, for the turns that are left: it begins at a user's after message ``after``.
        """
        target, wrong = row.stretches[at], None
        systems = next((n for n, m in enumerate(chat.messages) if m["role"] != "system"), 0)
        users = [n for n in range(systems + 1, number) if chat.messages[n]["role"] == "user" and n > after]
        for first in (systems, *users):
            messages = [*chat.messages[:systems], *chat.messages[first : number + 1]]
            for shown in self._alternatives(messages):
                prompt = self._apply(chat, shown[:-1], add_generation_prompt=True)
                before = Chat(messages[:-1], chat.tools)
                if prompt is None or not self._is_prompt(before, prompt, row, target[0]):
                    continue
                full = self._apply(chat, shown, add_generation_prompt=False) or ""
                is_cut = row.ends_early and target[1] == len(row.ids)
                if full.startswith(prompt) and not is_cut and not self._is_rest(full[len(prompt) :], told):
                    wrong = wrong or ("targets", repr(full[len(prompt) :][-60:]), repr(told[-60:]))
                    continue  # another spelling may have its reasoning in the content
                yield from self._check_controls(Chat(messages[-1:]), told, row.ids[target[0] : target[1]])
                return
        yield wrong or ("prompt", f"what generation is given for message {number + 1}", repr(told[:60]))

    def _is_prompt(self, chat: Chat, text: str, row: Assembled, start: int) -> bool:
        before = row.ids[:start]
        if self.texts.spelled(chat):  # its control tokens are spelled out, and transformers would not do that
            decoded = self.texts.backend.decode(before, skip_special_tokens=False)
            told, asked = self.texts.loosened(decoded), self.texts.loosened(self.texts.normalized(text))
            is_same = told == asked or (not self.texts.options.train_on.reasoning and told.startswith(asked))
            return is_same and not any(self._check_controls(chat, decoded, before))
        ids = cast(list[int], self.texts.tokenizer(text, add_special_tokens=False)["input_ids"])
        if row.starts_late:
            return ids[-len(before) :] == before
        # where reasoning is only read, it follows the prompt
        return before == ids or (not self.texts.options.train_on.reasoning and before[: len(ids)] == ids)

    def _check_controls(self, chat: Chat, text: str, ids: list[int]) -> Iterator[Failed]:
        """Of the control tokens in a text, those that a record spelled are no tokens."""
        own = len(self.texts.pattern.findall(text)) - len(self.texts.spelled(chat))
        found = self.texts.count_controls(ids)
        if found != own:
            yield "control", f"{own} control tokens", str(found)

    def _is_rest(self, rest: str, told: str) -> bool:
        """Whether a target is what the template writes after the prompt, up to the turn's last token."""
        rest, told = self.texts.loosened(self.texts.normalized(rest)), self.texts.loosened(told)
        if not self.texts.options.train_on.reasoning:  # it begins after what is only read
            return told in rest or told.removesuffix(self.texts.eos) in rest
        return rest.startswith(told) or rest.rstrip() == told.removesuffix(self.texts.eos)

    def _is_whole(self, chat: Chat, text: str, row: Assembled, *, proves: bool) -> bool:
        """Whether a conversation that is learned whole is what the template writes."""
        told = squeezed(text.strip(HALF_LETTER))
        for shown in self._alternatives(chat.messages) if proves else ():
            whole = self._apply(chat, shown, add_generation_prompt=False) or ""
            whole = squeezed(self.texts.normalized(whole))
            if told == whole or (row.ends_early and whole.startswith(told)):
                return True
            if row.starts_late and told in whole:
                return True
        return not proves

    def _apply(self, chat: Chat, shown: list[Any], *, add_generation_prompt: bool) -> str | None:
        """transformers' own rendering; None where the template takes no such messages."""
        template: Any = self.texts.tokenizer
        for tools in (chat.tools or None, chat.tools):
            try:
                return template.apply_chat_template(
                    shown,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **chat.template_kwargs,
                )
            except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
                continue
        return None

    def _alternatives(self, messages: Sequence[Any]) -> Iterator[list[dict[str, Any]]]:
        """The messages in the spellings that templates expect, the usual one first."""
        has_calls = any("tool_calls" in message for message in messages)
        has_reasoning = any("reasoning" in message for message in messages)
        both, one = (False, True), (False,)
        of_calls = both if has_calls else one
        in_content = both if has_reasoning and self.texts.options.reasoning != "drop" else one
        shown = list(map(self._without_end, messages))
        for choice in product(in_content, both, of_calls, of_calls, of_calls):
            yield [_spelled(message, Spelling(*choice)) for message in shown]

    def _without_end(self, message: Any) -> Any:
        """The message without an end token that an answer has written by hand."""
        content, ends = message.get("content", "").rstrip(), (self.texts.eos, *self.texts.special)
        end = next((token for token in ends if content.endswith(token)), None)
        if message["role"] != "assistant" or end is None:
            return message
        return {**message, "content": content.removesuffix(end)}


def _spelled(message: Any, spelling: Spelling) -> dict[str, Any]:
    """A message as a template may expect it."""
    shown = {key: value for key, value in message.items() if key not in ("weight", "reasoning")}
    reasoning = message.get("reasoning")
    if reasoning and spelling.in_content:
        shown["content"] = f"<think>\n{reasoning}\n</think>\n\n{message.get('content', '')}"
    elif reasoning:
        shown |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), reasoning)
    if spelling.empty_content:
        shown.setdefault("content", "")
    if spelling.parts and "content" in shown:
        shown["content"] = [{"type": "text", "text": shown["content"]}]
    if "tool_calls" in shown:
        calls = [_spelled_call(call, as_text=spelling.arguments_as_text) for call in shown["tool_calls"]]
        shown["tool_calls"] = calls
    if spelling.short_ids:
        for part in (shown, *shown.get("tool_calls", [])):
            part.update({key: short_call_id(part[key]) for key in ("id", "tool_call_id") if key in part})
    return shown


def _spelled_call(call: Any, *, as_text: bool) -> dict[str, Any]:
    """A tool call with its arguments as an object, or as JSON text."""
    arguments = call["function"]["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not as_text and isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return {**call, "function": {**call["function"], "arguments": arguments}}
