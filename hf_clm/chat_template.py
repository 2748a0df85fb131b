"""Renders a chat to segments: the one renderer of training, generation and evaluation.

The targets are what the template puts between ``{% generation %}`` and ``{% endgeneration %}``. A template
without these marks is rendered turn by turn: where each rendering begins with the one before, the difference
is the target. Either way the text before a target must be the prompt that the template gives for it.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from hf_clm.errors import DataError, ModelError
from hf_clm.schema import Message, Segment
from hf_clm.tokenizer import control_pattern, control_tokens, unique_ids

# Noncharacters of Unicode, which no text may hold: they carry "the user wrote this token" through Jinja.
MARK_START, MARK_END = "\ufdd0", "\ufdd1"
MARKED = re.compile(f"{MARK_START}(.*?){MARK_END}", re.DOTALL)

# Keeps two read-only pieces apart for the tokenizer: a turn has the same ids, learned or not.
BORDER = Segment("", is_target=True)

Span = tuple[int, int]  # start and end of a target in the rendered text, characters


def render_chat(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    *,
    train_on: str = "all_turns",
    mark: Callable[[str], str] | None = None,
) -> list[Segment]:
    """A whole conversation as segments: assistant turns with their stop token are targets.

    Args:
        train_on: ``all_turns``, ``last_turn`` or ``everything``; a message's ``train: False`` masks its turn.
        mark: applied to every content; ``mark_control_text`` keeps control tokens in it plain text.

    Raises DataError where the template refuses the messages; ModelError where its targets cannot be told.
    """
    text, spans = _render_spans(_marked(messages, mark), tokenizer)
    learned = [message.get("train", True) for message in messages if message["role"] == "assistant"]
    if train_on == "last_turn":
        learned = [False] * len(learned[:-1]) + learned[-1:]
    if train_on == "everything":
        text = text[: _without_tail(text, (0, len(text)), tokenizer=tokenizer)[1]]
    return _cut(text, spans, learned=learned, others=train_on == "everything")


def render_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    *,
    mark: Callable[[str], str] | None = None,
) -> list[Segment]:
    """What ``generate`` is given: the messages and the opening of the assistant's turn, all read-only."""
    marked = _marked(messages, mark)
    try:
        text, spans = _render_spans(marked, tokenizer, add_generation_prompt=True)
    except ModelError:  # refused in training: there is no border to agree with
        text, spans = _render(marked, tokenizer, add_generation_prompt=True)[0], []
    return _cut(text, spans, learned=[False] * len(spans), others=False)


def turn_end_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id of the token that closes an assistant turn, or None without a chat template.

    Raises ModelError if the template does not close it with one token.
    """
    if not tokenizer.chat_template:
        return None
    messages: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    segments = render_chat(messages, tokenizer)
    target = "".join(segment.text for segment in segments if segment.is_target)
    token = next(token for token in control_tokens(tokenizer) if target.endswith(token))
    return tokenizer.get_added_vocab()[token]


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids at which generation stops: the end token, then the end of an assistant turn, if another.

    A template whose turns cannot be told apart adds none: it is refused where chats are trained on.
    """
    end: Any = tokenizer.eos_token_id
    try:
        return unique_ids([end, turn_end_id(tokenizer)])
    except (ModelError, DataError):
        return [end]


def mark_control_text(text: str, tokenizer: PreTrainedTokenizerFast, *, own: Sequence[Span] = ()) -> str:
    """Wraps every control token that ``text`` spells, so that ``split_marked`` makes plain text of it.

    Args:
        own: stretches of the text that are no user's: a token that lies in one of them stays a token.
    """
    if MARK_START in text or MARK_END in text:
        fix = "remove it; no valid text contains one"
        raise DataError("the text holds a noncharacter (U+FDD0 or U+FDD1)", fix=fix)

    def mark(match: re.Match[str]) -> str:
        return match[0] if lies_in(match, own) else f"{MARK_START}{match[0]}{MARK_END}"

    return control_pattern(tokenizer).sub(mark, text)


def lies_in(match: re.Match[str], spans: Sequence[Span]) -> bool:
    """Whether one of the stretches holds the whole match."""
    return any(start <= match.start() and match.end() <= end for start, end in spans)


def split_marked(text: str, *, is_target: bool) -> list[Segment]:
    """The text as segments, in which the marked pieces are plain and without their marks.

    Raises DataError where the template has parted a mark from its other half.
    """
    pieces = MARKED.split(text)  # [text, marked, text, marked, ..., text]
    if any(mark in piece for piece in pieces for mark in (MARK_START, MARK_END)):
        fix = "remove the control token from the text, or set data.special_tokens_in_text to allow"
        raise DataError("the chat template cuts a text at a control token that it holds", fix=fix)
    return [Segment(piece, is_target, is_plain=i % 2 == 1) for i, piece in enumerate(pieces) if piece]


def _marked(messages: Sequence[Message], mark: Callable[[str], str] | None) -> list[dict[str, str]]:
    plain = mark or (lambda text: text)
    return [{"role": message["role"], "content": plain(message["content"])} for message in messages]


def _cut(text: str, spans: list[Span], *, learned: list[bool], others: bool) -> list[Segment]:
    """The text as segments: each span by its entry in ``learned``, what lies between them by ``others``."""
    segments, position = [], 0
    for (start, end), is_target in zip(spans, learned, strict=True):
        segments += split_marked(text[position:start], is_target=others)
        segments += [Segment("", is_target=not others), *split_marked(text[start:end], is_target=is_target)]
        position = end
    return segments + split_marked(text[position:], is_target=others)


def _render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, *, add_generation_prompt: bool = False
) -> tuple[str, list[Span]]:
    if not tokenizer.chat_template:
        fix = "set tokenizer.chat_template to chatml, plain or a .jinja file"
        raise ModelError("has no chat template, and the data are chats", where="tokenizer", fix=fix)
    if not isinstance(tokenizer.chat_template, str):
        fix = "set tokenizer.chat_template to chatml, plain or a .jinja file"
        raise ModelError("has several chat templates", where="tokenizer", fix=fix)
    special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        texts, spans = render_jinja_template(
            [messages],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=_has_generation_marks(tokenizer),
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except TemplateSyntaxError as error:
        what = f"is no Jinja template (line {error.lineno}: {error.message})"
        raise ModelError(what, where="tokenizer.chat_template") from error
    except TemplateError as error:
        raise DataError(f"the chat template refuses the messages: {error}") from error
    return texts[0], [(int(start), int(end)) for start, end in spans[0]] if spans else []


def _render_spans(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, *, add_generation_prompt: bool = False
) -> tuple[str, list[Span]]:
    """The rendered conversation and one span for each assistant turn, which ends with its stop token."""
    text, spans = _render(messages, tokenizer, add_generation_prompt=add_generation_prompt)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [_render(messages[:turn], tokenizer, add_generation_prompt=True)[0] for turn in turns]
    if not _has_generation_marks(tokenizer):
        untils = [_render(messages[: turn + 1], tokenizer)[0] for turn in turns]
        spans = [(len(prompt), len(until)) for prompt, until in zip(prompts, untils, strict=True)]
        _check_prefixes(text, untils, turns=turns)
    if len(spans) != len(turns):
        what = f"the chat template marks {len(spans)} generation spans for {len(turns)} assistant turns"
        fix = "put {% generation %} around each assistant turn"
        raise ModelError(what, where="tokenizer.chat_template", fix=fix)
    _check_prefixes(text, prompts, turns=turns)
    for (start, _), prompt in zip(spans, prompts, strict=True):
        if start != len(prompt):
            raise ModelError(
                "{% generation %} does not open where the prompt for the assistant's turn ends",
                where="tokenizer.chat_template",
                got=f"a prompt that ends in {prompt[-20:]!r}, and before the mark {text[:start][-20:]!r}",
                fix="move the mark, or change what the template adds for add_generation_prompt",
            )
    return text, [_without_tail(text, span, tokenizer=tokenizer) for span in spans]


def _check_prefixes(text: str, prefixes: list[str], *, turns: list[int]) -> None:
    """Raises ModelError where a rendered part of the conversation is not how the whole begins."""
    for prefix, turn in zip(prefixes, turns, strict=True):
        if not text.startswith(prefix):
            raise ModelError(
                f"is not prefix-stable: what stands up to message {turn + 1} changes with later messages",
                where="the chat template",
                fix="name in tokenizer.chat_template a copy of it that renders a turn the same at any place,"
                " with {% generation %} and {% endgeneration %} around the assistant's turn",
            )


def _without_tail(text: str, span: Span, *, tokenizer: PreTrainedTokenizerFast) -> Span:
    """The span up to its stop token: what follows (a newline, in most templates) is never generated."""
    start, end = span[0], span[0] + len(text[slice(*span)].rstrip())
    if not any(text.startswith(token, end - len(token)) for token in control_tokens(tokenizer)):
        raise ModelError(
            "an assistant turn does not end in a control token, so nothing could stop at it",
            where="the chat template",
            got=repr(text[max(start, end - 20) : end]),
            fix="end the generation span with eos_token or the template's end-of-turn token",
        )
    return start, end


def _has_generation_marks(tokenizer: PreTrainedTokenizerFast) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)) is not None
