"""Renders a chat to segments: the one renderer of training, generation and evaluation.

The targets are what the template puts between ``{% generation %}`` and ``{% endgeneration %}``. A template without
these marks is rendered turn by turn: where each rendering begins with the one before, the difference is the target.
"""

import re
from collections.abc import Callable, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from hf_clm.errors import DataError, ModelError
from hf_clm.schema import Message, Segment
from hf_clm.tokenizer import control_pattern, control_tokens, unique_ids

# Noncharacters of Unicode, which no text may hold: they carry "this control token was written by the user" through Jinja.
MARK_START, MARK_END = "\ufdd0", "\ufdd1"
MARKED = re.compile(f"{MARK_START}(.*?){MARK_END}", re.DOTALL)

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
        train_on: ``all_turns``, ``last_turn`` or ``everything``; a message's own ``train: False`` masks its turn.
        mark: applied to every content; ``mark_control_text`` keeps control tokens in it plain text.

    Raises DataError where the template refuses the messages; ModelError where its targets cannot be told.
    """
    marked = _marked(messages, mark)
    text, spans = _render_spans(marked, tokenizer)
    if train_on == "everything":
        start, end = _without_tail(text, (0, len(text)), tokenizer)
        return split_marked(text[start:end], is_target=True)
    turns = [message for message in messages if message["role"] == "assistant"]
    learned = [span for span, turn in zip(spans, turns, strict=True) if turn.get("train", True)]
    if train_on == "last_turn":
        learned = [spans[-1]] if turns[-1].get("train", True) else []
    segments, position = [], 0
    for start, end in learned:
        segments += split_marked(text[position:start], is_target=False) + split_marked(text[start:end], is_target=True)
        position = end
    return segments + split_marked(text[position:], is_target=False)


def render_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, *, mark: Callable[[str], str] | None = None
) -> list[Segment]:
    """What ``generate`` is given: the messages and the opening of the assistant's turn, all read-only."""
    return split_marked(_render(_marked(messages, mark), tokenizer, True), is_target=False)


def turn_end_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id of the token that closes an assistant turn, or None without a chat template.

    Raises ModelError if the template does not close it with one token.
    """
    if not tokenizer.chat_template:
        return None
    segments = render_chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}], tokenizer)
    target = "".join(segment.text for segment in segments if segment.is_target)
    token = next(token for token in control_tokens(tokenizer) if target.endswith(token))
    return tokenizer.get_added_vocab()[token]


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids at which generation stops: the end token and the end of an assistant turn. Each once, end token first."""
    return unique_ids([tokenizer.eos_token_id, turn_end_id(tokenizer)])


def mark_control_text(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Wraps every control token that ``text`` spells, so that ``split_marked`` makes plain text of it."""
    if MARK_START in text or MARK_END in text:
        raise DataError("holds a noncharacter (U+FDD0 or U+FDD1)", fix="remove it; no valid text contains one")
    return control_pattern(tokenizer).sub(lambda match: f"{MARK_START}{match[0]}{MARK_END}", text)


def split_marked(text: str, *, is_target: bool) -> list[Segment]:
    """The text as segments, in which the marked pieces are plain and without their marks."""
    pieces = MARKED.split(text)  # [text, marked, text, marked, ..., text]
    return [Segment(piece, is_target, is_plain=i % 2 == 1) for i, piece in enumerate(pieces) if piece]


def _marked(messages: Sequence[Message], mark: Callable[[str], str] | None) -> list[dict[str, str]]:
    plain = mark or (lambda text: text)
    return [{"role": message["role"], "content": plain(message["content"])} for message in messages]


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, add_generation_prompt: bool) -> str:
    return _render_tracked(messages, tokenizer, add_generation_prompt)[0]


def _render_tracked(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, add_generation_prompt: bool
) -> tuple[str, list[Span]]:
    if not tokenizer.chat_template:
        fix = "set tokenizer.chat_template to chatml, plain or a .jinja file"
        raise ModelError("has no chat template, and the data are chats", where="tokenizer", fix=fix)
    if not isinstance(tokenizer.chat_template, str):
        raise ModelError("has several chat templates", where="tokenizer", fix="set tokenizer.chat_template to one")
    try:
        texts, spans = render_jinja_template(
            [messages],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=_has_generation_marks(tokenizer.chat_template),
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses the messages: {error}") from error
    return texts[0], [(start, end) for start, end in spans[0]] if spans else []


def _render_spans(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[str, list[Span]]:
    """The rendered conversation and one span for each assistant turn, which ends with its stop token."""
    text, spans = _render_tracked(messages, tokenizer, False)
    if not _has_generation_marks(tokenizer.chat_template):
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [_span_by_prefix(messages, turn, text, tokenizer) for turn in turns]
    turns = sum(message["role"] == "assistant" for message in messages)
    if len(spans) != turns:
        what = f"the chat template marks {len(spans)} generation spans for {turns} assistant turns"
        raise ModelError(what, where="tokenizer.chat_template", fix="put {% generation %} around each assistant turn")
    return text, [_without_tail(text, span, tokenizer) for span in spans]


def _span_by_prefix(
    messages: list[dict[str, str]], turn: int, text: str, tokenizer: PreTrainedTokenizerFast
) -> Span:
    before = _render(messages[:turn], tokenizer, True)
    until = _render(messages[: turn + 1], tokenizer, False)
    if not (until.startswith(before) and text.startswith(until)):
        raise ModelError(
            f"is not prefix-stable: message {turn + 1} changes what was rendered before it",
            where="the chat template",
            fix="put {% generation %} and {% endgeneration %} around the assistant's turn in a copy of the template,"
            " and name that file in tokenizer.chat_template",
        )
    return len(before), len(until)


def _without_tail(text: str, span: Span, tokenizer: PreTrainedTokenizerFast) -> Span:
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


def _has_generation_marks(chat_template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", chat_template) is not None
