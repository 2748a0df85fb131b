"""Renders chats identically for training, generation, serving and evaluation.

    messages[:k]      apply_chat_template(..., add_generation_prompt=True)   the prompt of assistant turn k
    messages[:k + 1]  apply_chat_template(...)                               the prompt and the target

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n | Hello!<|im_end|> | \\n
    prompt                                                 | target           | never generated: no loss

Templates do not need ``{% generation %}`` marks: the target is the part of the second text after the first.
See ``_after_prompt`` for templates whose second text does not begin with the first.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import Any, Literal, NamedTuple, TypeVar, cast

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from hf_clm.errors import DataError, ModelError, UserError
from hf_clm.schema import Chat, Json, Message, short_call_id
from hf_clm.text.encode import MARK_END, MARK_START, Encoder
from hf_clm.text.tokenizer import unique_ids, unread_variable

Reasoning = Literal["refuse", "in_content", "drop"]
# The names that templates use for a turn's reasoning, and the variables that switch it on and off.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
REASONING_KEY = re.compile(rf"""(?:\.|\[["']|get\(["'])({"|".join(REASONING_KEYS)})\b""")
THINKING_SWITCHES = ("enable_thinking", "thinking", "reasoning")
# The marks that open reasoning in the generation prompts of public templates, and the marks that close it.
CLOSING_MARKS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<reasoning>": "</reasoning>",
    "<|channel>thought": "<channel|>",
}
OPEN_MARK = re.compile("|".join(map(re.escape, CLOSING_MARKS)))
CLOSE_MARK = re.compile("|".join(map(re.escape, CLOSING_MARKS.values())))
NO_PLACE = "the chat template has no place"
EXCERPT_LENGTH = 60  # characters of a text in an error message


class AssistantTurn(NamedTuple):
    """An assistant turn: the prompt passed to ``generate`` and the target that the model must produce.

    end: the token with which the template ends the turn; "" if it has none and a stop token was added.
    reasoning_end: where in the target the reasoning ends (characters); 0 without reasoning.
    """

    message: int
    prompt: str
    target: str
    end: str
    reasoning_end: int


class Variant(NamedTuple):
    """Details that OpenAI's format leaves open. The first variant that a template accepts is used."""

    in_content: bool = False  # move the reasoning into the content or drop it, as the recipe specifies
    parts: bool = False  # content is a list of parts, as templates of vision models require
    arguments_as_text: bool = False
    empty_content: bool = False  # content is "", not missing, if a turn has none
    short_ids: bool = False  # ids of nine characters, as Mistral's templates require


VARIANTS = [Variant(*choice) for choice in product((False, True), repeat=len(Variant._fields))]
TemplateMessages = list[dict[str, Json]]  # messages in the form in which a template receives them
Rendered = TypeVar("Rendered")


class ChatRenderer:
    """Renders chats with a tokenizer's template.

    Args:
        protects: encode control tokens in a record's text as plain text (see ``Encoder.mark``).
        reasoning: what to do with reasoning if the template has no place for it: ``refuse`` (DataError),
            ``in_content`` (write it between marks before the content) or ``drop``.

    ``notes`` counts the changes made to records.
    """

    def __init__(self, encoder: Encoder, *, protects: bool = True, reasoning: Reasoning = "refuse"):
        self.encoder, self.protects, self.reasoning = encoder, protects, reasoning
        self.notes: Counter[str] = Counter()
        self._checked_shapes: set[tuple[object, ...]] = set()  # shapes of chats that render every turn

    def prompt(self, chat: Chat) -> str:
        """Returns the input of ``generate``: all messages and the opening of the assistant's turn."""

        def render(messages: TemplateMessages) -> str:
            self._check_turns(chat, messages)
            return self._apply(chat, messages, opens=True)

        return self._try_variants(chat, render)

    def full_text(self, chat: Chat) -> str:
        """Returns the text for pretraining: all turns, up to the template's last token."""

        def render(messages: TemplateMessages) -> str:
            self._check_turns(chat, messages)
            text = self._apply(chat, messages, opens=False)
            ends = [match.end() for match in self.encoder.any_control.finditer(text)]
            return text[: ends[-1]] if ends and not text[ends[-1] :].strip() else text

        return self._try_variants(chat, render)

    def turns(self, chat: Chat) -> list[AssistantTurn]:
        """Returns the assistant turns, each with its prompt for generation.

        Raises DataError if the template refuses the chat, omits a part of it, or renders a turn that does not
        follow its prompt. Raises ModelError if the tokenizer has no template.
        """
        return self._try_variants(chat, lambda messages: list(self._turns(chat, messages)))

    def stops(self) -> list[str]:
        """Returns the tokens that end an assistant turn: a text and, if supported, a tool call."""
        ends = []
        for probe in _PROBES:
            try:
                ends += [turn.end for turn in self.turns(probe)]
            except UserError:  # the template does not support such a turn
                continue
        return list(dict.fromkeys(end for end in ends if end))

    def _check_turns(self, chat: Chat, messages: TemplateMessages) -> None:
        """Raises DataError if the template does not render a tool call or the reasoning of a turn."""
        if any("tool_calls" in message or "reasoning" in message for message in chat.messages):
            list(self._turns(chat, messages))

    def _turns(self, chat: Chat, messages: TemplateMessages) -> Iterator[AssistantTurn]:
        for number, message in enumerate(chat.messages):
            if message["role"] != "assistant" or number == 0:  # a first turn has no prompt
                continue
            prompt = self._apply(chat, messages[:number], opens=True)
            for switches in self._switches(chat, message):
                full = self._apply(
                    replace(chat, template_kwargs=switches), messages[: number + 1], opens=False
                )
                if full.startswith(prompt):
                    break
            else:
                full = self._apply(chat, messages[: number + 1], opens=False)
            text = self._after_prompt(chat, messages[: number + 1], prompt=prompt, full=full)
            target, end = self._up_to_end(text, message)
            yield AssistantTurn(
                number, prompt, target, end, self._check_target(message, target, messages[number])
            )

    def _switches(self, chat: Chat, message: Message) -> Iterator[dict[str, Json]]:
        """Yields the chat's variables, then the same with each switch that shows or hides reasoning."""
        yield chat.template_kwargs
        for name in self._thinking_switches(chat):
            yield {**chat.template_kwargs, name: bool(message.get("reasoning"))}

    def _after_prompt(self, chat: Chat, messages: TemplateMessages, *, prompt: str, full: str) -> str:
        """Returns what the model must generate after ``prompt`` to produce the turn in ``full``.

            prompt              full                    result
            A:\\n               A:\\nHello!<end>         Hello!<end>
            A:\\n<think>\\n     A:\\nHello!<end>         \\n</think>\\n\\nHello!<end>
            A:\\n<think></think> A:\\nHello!<end>        Hello!<end>
            [Be kind. Hi]       [Hi]Hello!<end>         Hello!<end>

        The prompt is never changed, since generation will use the same prompt.
        """
        if full.startswith(prompt):
            return full[len(prompt) :]
        start = self._common_start(prompt, full)
        extra, rest = prompt[start:], full[start:]
        marks = list(OPEN_MARK.finditer(extra))
        if marks and not CLOSE_MARK.search(extra, marks[-1].end()) and not extra[marks[-1].end() :].strip():
            reasoning = self._reasoning_text(chat, messages, prompt=prompt, mark=marks[-1][0])
            closed = CLOSE_MARK.match(rest.lstrip())  # the template already closes the reasoning
            return (
                reasoning.partition(CLOSING_MARKS[marks[-1][0]])[0].lstrip() + rest.lstrip()
                if closed
                else (reasoning + rest.lstrip("\n"))
            )
        if not extra.strip():
            return rest.lstrip()
        if CLOSE_MARK.search(extra) and not CLOSE_MARK.sub("", OPEN_MARK.sub("", extra)).strip():
            if chat.messages[len(messages) - 1].get("reasoning"):
                raise self._no_reasoning()
            closed = CLOSE_MARK.match(rest)  # the prompt already closes the reasoning
            return rest[closed.end() :] if closed else rest
        if (answer := self._after_same_header(chat.messages[len(messages) - 1], prompt, full)) is not None:
            return answer  # earlier turns differ, e.g. because only the last question has the system text
        extra, rest = extra[:EXCERPT_LENGTH], rest[:EXCERPT_LENGTH]
        raise DataError(
            "the chat template renders an answer that does not follow its own prompt",
            got=f"the prompt continues with {extra!r}, the answer with {rest!r}",
            fix="set tokenizer.chat_template to another template",
        )

    def _after_same_header(self, message: Message, prompt: str, full: str) -> str | None:
        """Returns the text after the prompt's last header in ``full``, or None if the answer is not there."""
        content = self._mark(message.get("reasoning") or message.get("content", ""), by_model=True).strip()
        header, answer = self.encoder.last_context(prompt), full.rfind(content) if content else -1
        start = full.rfind(header, 0, answer) + len(header) if header and answer >= 0 else -1
        if start < len(header):
            return None
        between = self.encoder.any_control.sub("", full[start:answer]).split()
        is_header = len(between) < 2 and all(len(word) < 20 for word in between)
        return full[start:] if is_header else None

    def _reasoning_text(self, chat: Chat, messages: TemplateMessages, *, prompt: str, mark: str) -> str:
        """Returns the reasoning, with its closing mark, that continues a prompt that opens reasoning.

        Without reasoning in the turn, this is the template's form of empty reasoning.
        """
        message = chat.messages[len(messages) - 1]
        closing = CLOSING_MARKS[mark]
        reasoning = message.get("reasoning", "").strip()
        if not reasoning and closing in message.get("content", ""):
            reasoning = message.get("content", "").partition(closing)[0].removeprefix(mark).strip()
        if reasoning:
            return f"{self._mark(reasoning, by_model=True)}\n{closing}\n\n"
        for name in self._thinking_switches(chat):
            without = replace(chat, template_kwargs={**chat.template_kwargs, name: False})
            other = self._apply(without, messages[:-1], opens=True)
            if other.startswith(prompt) and closing in other[len(prompt) :]:
                return other[len(prompt) :]
        return f"\n{closing}\n\n"

    def _common_start(self, prompt: str, full: str) -> int:
        """Returns the length of the common prefix; it never ends inside a control token or reasoning mark."""
        differs = (at for at, (left, right) in enumerate(zip(prompt, full, strict=False)) if left != right)
        start = next(differs, min(len(prompt), len(full)))
        tokens = [
            match
            for text in (prompt, full)
            for pattern in (self.encoder.any_control, OPEN_MARK, CLOSE_MARK)
            for match in pattern.finditer(text, max(0, start - EXCERPT_LENGTH))
        ]
        return min((match.start() for match in tokens if match.start() < start < match.end()), default=start)

    def _up_to_end(self, text: str, message: Message) -> tuple[str, str]:
        """Returns the turn up to its end token, and that token, or "" if the tokenizer's end token was added.

        Hello!<|end|>\\n<|endoftext|>      the first token after the text, if only tokens follow
        {"name": ...}</tool_call><|end|>    for a call, the token that ends a text, else the last token
        """
        stripped = text.rstrip()
        after = self._after_content(text, message)
        ends = [
            end for end in self._last_tokens(stripped) if end.start() >= after
        ]  # not those in the content
        # adjacent tokens end a turn together: <|END_RESPONSE|><|END_OF_TURN_TOKEN|>
        while len(ends) > 1 and ends[0].end() == ends[1].start() and "tool_calls" not in message:
            ends = ends[1:]
        if "tool_calls" in message:
            usual = [end for end in ends if end[0] == self._text_end]
            ends = usual[:1] or [end for end in ends[-1:] if self.encoder.special.fullmatch(end[0])]
        if ends:
            return stripped[: ends[0].end()], ends[0][0]
        if after and (first := self.encoder.special.search(text, after)):
            return text[: first.end()], first[0]
        return stripped + str(self.encoder.tokenizer.eos_token), ""

    def _after_content(self, text: str, message: Message) -> int:
        """Returns where the content of a turn ends in its target, never in a special token; 0 without one."""
        content = self._mark(message.get("content", ""), by_model=True)
        target, answer = (
            self.encoder.special.sub(lambda match: "\0" * len(match[0]), part)
            for part in (text, CLOSE_MARK.split(content)[-1].strip())
        )
        at = target.rfind(answer) if answer else -1
        return at + len(answer) if at >= 0 else 0

    def _last_tokens(self, text: str) -> list[re.Match[str]]:
        """Returns the control tokens at the end of a text, with only whitespace between them."""
        tokens: list[re.Match[str]] = []
        for match in self.encoder.any_control.finditer(text):
            if tokens and text[tokens[-1].end() : match.start()].strip():
                tokens = []
            tokens.append(match)
        return tokens if tokens and tokens[-1].end() == len(text) else []

    @cached_property
    def _text_end(self) -> str:
        """The token that ends a text turn."""
        try:
            return self.turns(_PROBES[0])[0].end
        except UserError:  # the template needs more than a question and an answer
            return ""

    def _check_target(self, message: Message, target: str, template_message: dict[str, Json]) -> int:
        """Returns where the reasoning ends in the target. Raises DataError if the target lacks a part."""
        content, reasoning = (
            self._mark(message.get(key, ""), by_model=True).strip() for key in ("content", "reasoning")
        )
        calls: Any = template_message.get("tool_calls", [])
        if any(call["function"]["name"] not in target for call in calls):
            fix = "set tokenizer.chat_template to a template that supports tool calls"
            raise DataError(f"{NO_PLACE} for tool_calls", fix=fix)
        if any(_is_python(call["function"]["arguments"], target) for call in calls):
            raise DataError("the chat template does not render the arguments as JSON")
        at = target.find(reasoning) if reasoning else -1
        is_given = any(template_message.get(key) for key in REASONING_KEYS) or self.reasoning == "in_content"
        if reasoning and at < 0 and is_given:
            raise self._no_reasoning()
        closing = CLOSE_MARK.search(target, max(at, 0))
        end = closing.end() if closing else at + len(reasoning) if at >= 0 else 0
        if content and CLOSE_MARK.split(content)[-1].strip() not in target[end if reasoning else 0 :]:
            raise DataError("the chat template changes the answer", got=repr(target[:EXCERPT_LENGTH]))
        return len(target) - len(target[end:].lstrip()) if end else 0

    def _no_reasoning(self) -> DataError:
        fix = "set data.reasoning to in_content (write it into the content) or drop"
        if switches := self._thinking_switches(Chat([])):
            fix += f", or try tokenizer.chat_template_kwargs: {{{switches[0]}: true}}"
        return DataError(f"{NO_PLACE} for reasoning", fix=fix)

    def _check_rendered(self, chat: Chat, messages: TemplateMessages, variant: Variant) -> None:
        """Raises DataError for a message that the template omits. Runs once for each shape of chats.

        The contents are replaced with placeholder words, since a record's text may occur elsewhere by chance.
        """
        has_tools = bool(chat.tools)
        shape = (variant, has_tools, *chat.template_kwargs, *((turn["role"], *turn) for turn in messages))
        if shape in self._checked_shapes:
            return
        if what := unread_variable(chat.template_kwargs, self._source(has_tools=has_tools)):
            raise DataError(what, fix="correct or remove it in chat_template_kwargs")
        words = [f"Word{number}x" for number in range(len(messages))]
        probe = [
            {**turn, "content": [{"type": "text", "text": word}] if variant.parts else word}
            if turn.get("content")
            else turn
            for turn, word in zip(messages, words, strict=True)
        ]
        text = self._render_probe(chat, probe)
        if has_tools and text == self._without_tools(chat, probe):
            fix = "remove them, or set tokenizer.chat_template to a template that supports tools"
            raise DataError(f"{NO_PLACE} for tools", fix=fix)
        for number, (turn, word) in enumerate(zip(probe, words, strict=True), start=1):
            if turn.get("content") and word not in text:
                what = f"the chat template omits message {number} (role {turn['role']})"
                raise DataError(what, fix="remove it, or set tokenizer.chat_template to another template")
        self._checked_shapes.add(shape)

    def _render_probe(self, chat: Chat, probe: TemplateMessages) -> str:
        """Returns everything that the template renders of a chat."""
        text = self._apply(chat, probe, opens=False)
        answers = [number for number, turn in enumerate(probe) if turn["role"] == "assistant" and number]
        if not answers:
            return text
        # some texts are only rendered while the question is the last turn
        return text + self._apply(chat, probe[: answers[-1]], opens=True)

    def _without_tools(self, chat: Chat, probe: TemplateMessages) -> str:
        try:
            return self._render_probe(replace(chat, tools=[]), probe)
        except DataError:  # the template requires tools
            return ""

    def _try_variants(self, chat: Chat, render: Callable[[TemplateMessages], Rendered]) -> Rendered:
        """Renders with the first variant that the template accepts; raises the clearest error otherwise."""
        errors: list[DataError] = []
        tried: list[TemplateMessages] = []
        for variant in VARIANTS:
            if variant.in_content and self.reasoning == "refuse":
                break
            messages = [self._message(message, variant) for message in chat.messages]
            if messages in tried:
                continue
            tried.append(messages)
            try:
                rendering = render(messages)
                self._check_rendered(chat, messages, variant)
            except DataError as error:
                errors.append(error)
                continue
            if variant.in_content:
                self.notes[f"reasoning: {self.reasoning}"] += 1
            return rendering
        raise next((error for error in errors if error.what.startswith(NO_PLACE)), errors[0])

    def _message(self, message: Message, variant: Variant) -> dict[str, Json]:
        entry: dict[str, Json] = {"role": message["role"]}
        content = message.get("content", "" if variant.empty_content else None)
        reasoning = message.get("reasoning", "")
        if reasoning and variant.in_content:
            if self.reasoning == "in_content":
                content = f"<think>\n{reasoning}\n</think>\n\n{content or ''}"
            reasoning = ""
        if content is not None:
            text = self._mark(content, by_model=message["role"] == "assistant")
            entry["content"] = [{"type": "text", "text": text}] if variant.parts else text
        for key in (self.reasoning_keys or REASONING_KEYS[:1]) if reasoning else ():
            entry[key] = self._mark(reasoning, by_model=True)
        if "tool_calls" in message:
            entry["tool_calls"] = [self._call(call, variant) for call in message["tool_calls"]]
        if "name" in message:
            entry["name"] = self._mark(message["name"])
        if "tool_call_id" in message:
            entry["tool_call_id"] = _to_id(message["tool_call_id"], variant)
        return entry

    def _call(self, call: Any, variant: Variant) -> dict[str, Json]:
        arguments = call["function"]["arguments"]
        if variant.arguments_as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if not variant.arguments_as_text and isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        function = {"name": call["function"]["name"], "arguments": self._mark_all(arguments, by_model=True)}
        entry: dict[str, Json] = {"type": "function", "function": function}
        return {"id": _to_id(call["id"], variant), **entry} if "id" in call else entry

    @property
    def reasoning_keys(self) -> list[str]:
        """The keys from which the template reads a turn's reasoning."""
        return list(dict.fromkeys(REASONING_KEY.findall(self._source(has_tools=False))))

    def _thinking_switches(self, chat: Chat) -> list[str]:
        source = self._source(has_tools=bool(chat.tools))
        names = [name for name in THINKING_SWITCHES if re.search(rf"(?<![.\w'\"]){name}\b", source)]
        return [name for name in names if name not in chat.template_kwargs]

    def _source(self, *, has_tools: bool) -> str:
        template = cast(Any, self.encoder.tokenizer.chat_template)
        if isinstance(template, dict):
            return str(template.get("tool_use" if has_tools else "default", template.get("default", "")))
        return str(template or "")

    def _mark(self, text: str, *, by_model: bool = False) -> str:
        return self.encoder.mark(text, by_model=by_model) if self.protects else text

    def _mark_all(self, value: Json, *, by_model: bool) -> Json:
        """Marks every text of a JSON value, including the keys of its objects."""
        if isinstance(value, str):
            return self._mark(value, by_model=by_model)
        if isinstance(value, list):
            return [self._mark_all(item, by_model=by_model) for item in value]
        if isinstance(value, dict):
            both = ((self._mark(key, by_model=by_model), item) for key, item in value.items())
            return {key: self._mark_all(item, by_model=by_model) for key, item in both}
        return value

    def _apply(self, chat: Chat, messages: Sequence[dict[str, Json]], *, opens: bool) -> str:
        """Renders with transformers; converts every failure of a template to a one-line error."""
        tokenizer: Any = self.encoder.tokenizer
        if not tokenizer.chat_template:
            fix = "set tokenizer.chat_template to chatml, plain or a .jinja file"
            raise ModelError("has no chat template, but the data are chats", where="tokenizer", fix=fix)
        tools: Any = [self._mark_all(tool, by_model=False) for tool in chat.tools] or None
        options: Any = {"tokenize": False, "add_generation_prompt": opens, **chat.template_kwargs}
        try:
            try:
                text = tokenizer.apply_chat_template(list(messages), tools=tools, **options)
            except TypeError as error:
                if tools is not None or "iterable" not in str(error):
                    raise
                # the template loops over tools that are None
                text = tokenizer.apply_chat_template(list(messages), tools=[], **options)
        except TemplateSyntaxError as error:
            what = f"is not a valid Jinja template (line {error.lineno}: {error.message})"
            raise ModelError(what, where="tokenizer.chat_template") from error
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise DataError(f"the chat template refuses the messages: {error}") from error
        if repr(MARK_START)[1:-1] in text or repr(MARK_END)[1:-1] in text:
            what = "the chat template renders a text with a control token as a Python literal"
            raise DataError(what, fix="remove the token, or set data.special_tokens_in_text to allow")
        return text


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Returns the ids at which generation stops: the end token and the tokens that end an assistant turn."""
    end: Any = tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return unique_ids([end])
    stops = ChatRenderer(Encoder(tokenizer)).stops()
    return unique_ids([end, *(tokenizer.get_added_vocab()[token] for token in stops)])


def _is_python(arguments: Json, target: str) -> bool:
    """Whether a template has rendered an object as a Python literal: ``{'a': 1}``."""
    return (
        isinstance(arguments, dict) and str(arguments) != json.dumps(arguments) and str(arguments) in target
    )


def _to_id(name: str, variant: Variant) -> str:
    return short_call_id(name) if variant.short_ids else name


_PROBE_TOOL: dict[str, Json] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}
_HI: Message = {"role": "user", "content": "Hi"}
_PROBES = [
    Chat([_HI, {"role": "assistant", "content": "Hi"}]),
    Chat(
        [
            _HI,
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "type": "function",
                        "id": "call12345",
                        "function": {"name": "look", "arguments": {"at": "me"}},
                    }
                ],
            },
        ],
        tools=[_PROBE_TOOL],
    ),
]
