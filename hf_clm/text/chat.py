"""Renders chats as the model is asked: the one renderer of training, generation, serving and evaluation.

    messages[:k]      apply_chat_template(..., add_generation_prompt=True)   the prompt of assistant turn k
    messages[:k + 1]  apply_chat_template(...)                               what the template makes of it

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n | Hello!<|im_end|> | \\n
    prompt                                                 | target           | never generated: not learned

No template needs ``{% generation %}`` marks: the target is what the second text says after the first. Where
the second does not begin with the first, see ``_after_prompt``.
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
# How templates name a turn's reasoning, and the variables that switch it on and off.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
REASONING_KEY = re.compile(rf"""(?:\.|\[["']|get\(["'])({"|".join(REASONING_KEYS)})\b""")
THINKING_SWITCHES = ("enable_thinking", "thinking", "reasoning")
# The marks of reasoning that generation prompts of public templates open, and what closes each.
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
SHOWN = 60  # characters on each side of a difference in an error


class Turn(NamedTuple):
    """An assistant turn: what generation is given, and what the model must answer.

    end: the token that the template ends the turn with; "" where it writes none and a stop token was added.
    thought: where in the target its reasoning ends, 0 for none.
    """

    message: int
    prompt: str
    target: str
    end: str
    thought: int


class Variant(NamedTuple):
    """How a template wants to see what OpenAI's format leaves open. The first one that it takes is used."""

    in_content: bool = False  # reasoning goes into the content, or is left out, as the recipe says
    parts: bool = False  # a content is a list of parts, as templates of vision models demand
    arguments_as_text: bool = False
    empty_content: bool = False  # "" where a turn has no content, not a missing key
    short_ids: bool = False  # nine letters, as Mistral's templates demand


VARIANTS = [Variant(*choice) for choice in product((False, True), repeat=len(Variant._fields))]
Shown = list[dict[str, Json]]  # messages as a template is given them
Rendered = TypeVar("Rendered")


class ChatRenderer:
    """Renders chats with the template of a tokenizer.

    Args:
        protects: keep control tokens that a record's text spells plain text (see ``Encoder.mark``).
        reasoning: for reasoning that the template has no place for: ``refuse`` (DataError), ``in_content``
            (between marks, before the content) or ``drop``.

    ``notes`` counts what was changed in a record on the way.
    """

    def __init__(self, encoder: Encoder, *, protects: bool = True, reasoning: Reasoning = "refuse"):
        self.encoder, self.protects, self.reasoning = encoder, protects, reasoning
        self.notes: Counter[str] = Counter()
        self._rendered: set[tuple[object, ...]] = set()  # shapes of chats of which every turn is rendered

    def prompt(self, chat: Chat) -> str:
        """What ``generate`` is given: all messages and the opening of the assistant's turn."""

        def render(shown: Shown) -> str:
            self._check_turns(chat, shown)
            return self._apply(chat, shown, opens=True)

        return self._try_variants(chat, render)

    def whole(self, chat: Chat) -> str:
        """All turns, up to the last token of the template's own: what pretraining reads."""

        def render(shown: Shown) -> str:
            self._check_turns(chat, shown)
            text = self._apply(chat, shown, opens=False)
            ends = [match.end() for match in self.encoder.any_control.finditer(text)]
            return text[: ends[-1]] if ends and not text[ends[-1] :].strip() else text

        return self._try_variants(chat, render)

    def turns(self, chat: Chat) -> list[Turn]:
        """The assistant turns, each with the prompt that generation is given for it.

        Raises DataError where the template refuses the chat, leaves a part of it out, or writes a turn that
        does not follow its prompt; ModelError for a tokenizer without a template.
        """
        return self._try_variants(chat, lambda shown: list(self._turns(chat, shown)))

    def stops(self) -> list[str]:
        """The tokens that end an assistant turn: a text, and a tool call where the template has them."""
        ends = []
        for probe in _PROBES:
            try:
                ends += [turn.end for turn in self.turns(probe)]
            except UserError:  # this template has no such turn
                continue
        return list(dict.fromkeys(end for end in ends if end))

    def _check_turns(self, chat: Chat, shown: Shown) -> None:
        """Raises DataError for a call or reasoning in earlier turns that training would not find either."""
        if any("tool_calls" in message or "reasoning" in message for message in chat.messages):
            list(self._turns(chat, shown))

    def _turns(self, chat: Chat, shown: Shown) -> Iterator[Turn]:
        for number, message in enumerate(chat.messages):
            if message["role"] != "assistant" or number == 0:  # nothing asks for a first turn
                continue
            prompt = self._apply(chat, shown[:number], opens=True)
            for switches in self._switches(chat, message):
                full = self._apply(replace(chat, template_kwargs=switches), shown[: number + 1], opens=False)
                if full.startswith(prompt):
                    break
            else:
                full = self._apply(chat, shown[: number + 1], opens=False)
            text = self._after_prompt(chat, shown[: number + 1], prompt=prompt, full=full)
            target, end = self._up_to_end(text, message)
            yield Turn(number, prompt, target, end, self._check_shown(message, target, shown[number]))

    def _switches(self, chat: Chat, message: Message) -> Iterator[dict[str, Json]]:
        """The chat's own variables, then those that show, or leave out, a turn's reasoning."""
        yield chat.template_kwargs
        for name in self._thinking_switches(chat):
            yield {**chat.template_kwargs, name: bool(message.get("reasoning"))}

    def _after_prompt(self, chat: Chat, shown: Shown, *, prompt: str, full: str) -> str:
        """What the model must write after ``prompt`` so that the turn says what it says in ``full``.

            prompt              full                    what the model must write
            A:\\n               A:\\nHello!<end>         Hello!<end>
            A:\\n<think>\\n     A:\\nHello!<end>         \\n</think>\\n\\nHello!<end>
            A:\\n<think></think> A:\\nHello!<end>        Hello!<end>
            [Be kind. Hi]       [Hi]Hello!<end>         Hello!<end>

        The prompt is never changed: it is what the model will be asked with.
        """
        if full.startswith(prompt):
            return full[len(prompt) :]
        start = self._common_start(prompt, full)
        extra, rest = prompt[start:], full[start:]
        marks = list(OPEN_MARK.finditer(extra))
        if marks and not CLOSE_MARK.search(extra, marks[-1].end()) and not extra[marks[-1].end() :].strip():
            thought = self._thought(chat, shown, prompt=prompt, mark=marks[-1][0])
            closed = CLOSE_MARK.match(rest.lstrip())  # the template closes it by itself
            return (
                thought.partition(CLOSING_MARKS[marks[-1][0]])[0].lstrip() + rest.lstrip()
                if closed
                else (thought + rest.lstrip("\n"))
            )
        if not extra.strip():
            return rest.lstrip()
        if CLOSE_MARK.search(extra) and not CLOSE_MARK.sub("", OPEN_MARK.sub("", extra)).strip():
            if chat.messages[len(shown) - 1].get("reasoning"):
                raise self._no_reasoning()
            closed = CLOSE_MARK.match(rest)  # the prompt has closed the reasoning already
            return rest[closed.end() :] if closed else rest
        if (answer := self._after_same_header(chat.messages[len(shown) - 1], prompt, full)) is not None:
            return answer  # earlier turns differ, as where only a last question has the system text
        raise DataError(
            "the chat template writes an answer that does not follow the prompt that it gives for it",
            got=f"the prompt goes on with {extra[:SHOWN]!r} where the answer has {rest[:SHOWN]!r}",
            fix="name another template in tokenizer.chat_template",
        )

    def _after_same_header(self, message: Message, prompt: str, full: str) -> str | None:
        """What follows the last place in ``full`` that ends as the prompt does, if the answer is there."""
        said = self._mark(message.get("reasoning") or message.get("content", ""), by_model=True).strip()
        header, answer = self.encoder.last_context(prompt), full.rfind(said) if said else -1
        start = full.rfind(header, 0, answer) + len(header) if header and answer >= 0 else -1
        if start < len(header):
            return None
        between = self.encoder.any_control.sub("", full[start:answer]).split()
        is_header = len(between) < 2 and all(len(word) < 20 for word in between)
        return full[start:] if is_header else None

    def _thought(self, chat: Chat, shown: Shown, *, prompt: str, mark: str) -> str:
        """What closes the reasoning that the prompt opens: a turn's own, or the template's form of none."""
        message = chat.messages[len(shown) - 1]
        closing = CLOSING_MARKS[mark]
        reasoning = message.get("reasoning", "").strip()
        if not reasoning and closing in message.get("content", ""):
            reasoning = message.get("content", "").partition(closing)[0].removeprefix(mark).strip()
        if reasoning:
            return f"{self._mark(reasoning, by_model=True)}\n{closing}\n\n"
        for name in self._thinking_switches(chat):
            without = replace(chat, template_kwargs={**chat.template_kwargs, name: False})
            other = self._apply(without, shown[:-1], opens=True)
            if other.startswith(prompt) and closing in other[len(prompt) :]:
                return other[len(prompt) :]
        return f"\n{closing}\n\n"

    def _common_start(self, prompt: str, full: str) -> int:
        """Where two texts part; never inside a control token or a mark of reasoning."""
        differs = (at for at, (left, right) in enumerate(zip(prompt, full, strict=False)) if left != right)
        start = next(differs, min(len(prompt), len(full)))
        tokens = [
            match
            for text in (prompt, full)
            for pattern in (self.encoder.any_control, OPEN_MARK, CLOSE_MARK)
            for match in pattern.finditer(text, max(0, start - SHOWN))
        ]
        return min((match.start() for match in tokens if match.start() < start < match.end()), default=start)

    def _up_to_end(self, text: str, message: Message) -> tuple[str, str]:
        """The turn up to the token that ends it, and that token; "" where the tokenizer's own was added.

        Hello!<|end|>\\n<|endoftext|>      the first token after a text, if nothing but tokens follows
        {"name": ...}</tool_call><|end|>    of a call the token that ends a text, else the last one
        """
        stripped = text.rstrip()
        after = self._after_content(text, message)
        ends = [end for end in self._last_tokens(stripped) if end.start() >= after]  # others the model writes
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
        """Where the content of a turn ends in its target; 0 where it has none. Not inside a special token."""
        content = self._mark(message.get("content", ""), by_model=True)
        shown, said = (
            self.encoder.special.sub(lambda match: "\0" * len(match[0]), part)
            for part in (text, CLOSE_MARK.split(content)[-1].strip())
        )
        at = shown.rfind(said) if said else -1
        return at + len(said) if at >= 0 else 0

    def _last_tokens(self, text: str) -> list[re.Match[str]]:
        """The control tokens at the end of a text, with nothing but white space between them."""
        found: list[re.Match[str]] = []
        for match in self.encoder.any_control.finditer(text):
            if found and text[found[-1].end() : match.start()].strip():
                found = []
            found.append(match)
        return found if found and found[-1].end() == len(text) else []

    @cached_property
    def _text_end(self) -> str:
        """The token that ends a turn that is a text."""
        try:
            return self.turns(_PROBES[0])[0].end
        except UserError:  # the template asks for more than a question and an answer
            return ""

    def _check_shown(self, message: Message, target: str, shown: dict[str, Json]) -> int:
        """Where the reasoning ends in the target. Raises DataError for a part of the turn that is missing."""
        content, reasoning = (
            self._mark(message.get(key, ""), by_model=True).strip() for key in ("content", "reasoning")
        )
        calls: Any = shown.get("tool_calls", [])
        if any(call["function"]["name"] not in target for call in calls):
            fix = "name one that has in tokenizer.chat_template"
            raise DataError(f"{NO_PLACE} for tool_calls", fix=fix)
        if any(_is_python(call["function"]["arguments"], target) for call in calls):
            raise DataError("the chat template does not write the arguments as JSON")
        at = target.find(reasoning) if reasoning else -1
        is_given = any(shown.get(key) for key in REASONING_KEYS) or self.reasoning == "in_content"
        if reasoning and at < 0 and is_given:
            raise self._no_reasoning()
        closing = CLOSE_MARK.search(target, max(at, 0))
        end = closing.end() if closing else at + len(reasoning) if at >= 0 else 0
        if content and CLOSE_MARK.split(content)[-1].strip() not in target[end if reasoning else 0 :]:
            raise DataError("the chat template does not write the answer as it is", got=repr(target[:SHOWN]))
        return len(target) - len(target[end:].lstrip()) if end else 0

    def _no_reasoning(self) -> DataError:
        fix = "data.reasoning: in_content writes it into the content, drop leaves it out"
        if switches := self._thinking_switches(Chat([])):
            fix += f"; or tokenizer.chat_template_kwargs: {{{switches[0]}: true}}, if that shows it"
        return DataError(f"{NO_PLACE} for reasoning", fix=fix)

    def _check_rendered(self, chat: Chat, shown: Shown, variant: Variant) -> None:
        """Raises DataError for a message that the template leaves out. Tried once for each shape of chats.

        Words of our own stand in for the contents: a text of the record may be found by chance elsewhere.
        """
        has_tools = bool(chat.tools)
        shape = (variant, has_tools, *chat.template_kwargs, *((turn["role"], *turn) for turn in shown))
        if shape in self._rendered:
            return
        if what := unread_variable(chat.template_kwargs, self._source(has_tools=has_tools)):
            raise DataError(what, fix="correct or remove it in chat_template_kwargs")
        words = [f"Word{number}x" for number in range(len(shown))]
        probe = [
            {**turn, "content": [{"type": "text", "text": word}] if variant.parts else word}
            if turn.get("content")
            else turn
            for turn, word in zip(shown, words, strict=True)
        ]
        text = self._probed(chat, probe)
        if has_tools and text == self._without_tools(chat, probe):
            fix = "leave them out, or name a template that has one in tokenizer.chat_template"
            raise DataError(f"{NO_PLACE} for tools", fix=fix)
        for number, (turn, word) in enumerate(zip(probe, words, strict=True), start=1):
            if turn.get("content") and word not in text:
                what = f"the chat template leaves out message {number} (role {turn['role']})"
                raise DataError(what, fix="remove it, or name another template in tokenizer.chat_template")
        self._rendered.add(shape)

    def _probed(self, chat: Chat, probe: Shown) -> str:
        """All that the template writes of a chat."""
        text = self._apply(chat, probe, opens=False)
        answers = [number for number, turn in enumerate(probe) if turn["role"] == "assistant" and number]
        if not answers:
            return text
        # some texts are only written while the question is the last turn
        return text + self._apply(chat, probe[: answers[-1]], opens=True)

    def _without_tools(self, chat: Chat, probe: Shown) -> str:
        try:
            return self._probed(replace(chat, tools=[]), probe)
        except DataError:  # the template needs them
            return ""

    def _try_variants(self, chat: Chat, render: Callable[[Shown], Rendered]) -> Rendered:
        """The rendering of the first variant that the template takes; the clearest error if it takes none."""
        errors: list[DataError] = []
        done: list[Shown] = []
        for variant in VARIANTS:
            if variant.in_content and self.reasoning == "refuse":
                break
            shown = [self._message(message, variant) for message in chat.messages]
            if shown in done:
                continue
            done.append(shown)
            try:
                found = render(shown)
                self._check_rendered(chat, shown, variant)
            except DataError as error:
                errors.append(error)
                continue
            if variant.in_content:
                self.notes[f"reasoning: {self.reasoning}"] += 1
            return found
        raise next((error for error in errors if error.what.startswith(NO_PLACE)), errors[0])

    def _message(self, message: Message, variant: Variant) -> dict[str, Json]:
        shown: dict[str, Json] = {"role": message["role"]}
        content = message.get("content", "" if variant.empty_content else None)
        reasoning = message.get("reasoning", "")
        if reasoning and variant.in_content:
            if self.reasoning == "in_content":
                content = f"<think>\n{reasoning}\n</think>\n\n{content or ''}"
            reasoning = ""
        if content is not None:
            text = self._mark(content, by_model=message["role"] == "assistant")
            shown["content"] = [{"type": "text", "text": text}] if variant.parts else text
        for key in (self.reasoning_keys or REASONING_KEYS[:1]) if reasoning else ():
            shown[key] = self._mark(reasoning, by_model=True)
        if "tool_calls" in message:
            shown["tool_calls"] = [self._call(call, variant) for call in message["tool_calls"]]
        if "name" in message:
            shown["name"] = self._mark(message["name"])
        if "tool_call_id" in message:
            shown["tool_call_id"] = _to_id(message["tool_call_id"], variant)
        return shown

    def _call(self, call: Any, variant: Variant) -> dict[str, Json]:
        arguments = call["function"]["arguments"]
        if variant.arguments_as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if not variant.arguments_as_text and isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        function = {"name": call["function"]["name"], "arguments": self._mark_all(arguments, by_model=True)}
        shown: dict[str, Json] = {"type": "function", "function": function}
        return {"id": _to_id(call["id"], variant), **shown} if "id" in call else shown

    @property
    def reasoning_keys(self) -> list[str]:
        """The names under which the template reads a turn's reasoning."""
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
        """Every text of a JSON value marked, the keys of its objects too."""
        if isinstance(value, str):
            return self._mark(value, by_model=by_model)
        if isinstance(value, list):
            return [self._mark_all(item, by_model=by_model) for item in value]
        if isinstance(value, dict):
            both = ((self._mark(key, by_model=by_model), item) for key, item in value.items())
            return {key: self._mark_all(item, by_model=by_model) for key, item in both}
        return value

    def _apply(self, chat: Chat, messages: Sequence[dict[str, Json]], *, opens: bool) -> str:
        """transformers' own rendering, with every failure of a template told in one line."""
        tokenizer: Any = self.encoder.tokenizer
        if not tokenizer.chat_template:
            fix = "set tokenizer.chat_template to chatml, plain or a .jinja file"
            raise ModelError("has no chat template, and the data are chats", where="tokenizer", fix=fix)
        tools: Any = [self._mark_all(tool, by_model=False) for tool in chat.tools] or None
        options: Any = {"tokenize": False, "add_generation_prompt": opens, **chat.template_kwargs}
        try:
            try:
                text = tokenizer.apply_chat_template(list(messages), tools=tools, **options)
            except TypeError as error:
                if tools is not None or "iterable" not in str(error):
                    raise
                # the template loops over tools that are not there
                text = tokenizer.apply_chat_template(list(messages), tools=[], **options)
        except TemplateSyntaxError as error:
            what = f"is not a valid Jinja template (line {error.lineno}: {error.message})"
            raise ModelError(what, where="tokenizer.chat_template") from error
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise DataError(f"the chat template refuses the messages: {error}") from error
        if repr(MARK_START)[1:-1] in text or repr(MARK_END)[1:-1] in text:
            what = "the chat template writes a text that spells a control token with Python's escapes"
            raise DataError(what, fix="remove the token, or set data.special_tokens_in_text to allow")
        return text


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids at which generation stops: the end token, then those that end an assistant turn."""
    end: Any = tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return unique_ids([end])
    stops = ChatRenderer(Encoder(tokenizer)).stops()
    return unique_ids([end, *(tokenizer.get_added_vocab()[token] for token in stops)])


def _is_python(arguments: Json, target: str) -> bool:
    """Whether a template has written an object as Python does: ``{'a': 1}``."""
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
