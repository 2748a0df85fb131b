"""Example -> segments: what is learned, what is read, and which control tokens are the user's own words."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from hf_clm.chat_template import (
    BORDER,
    MARK_END,
    MARK_START,
    Span,
    lies_in,
    mark_control_text,
    render_chat,
    render_prompt,
    split_marked,
)
from hf_clm.errors import DataError
from hf_clm.schema import ChatExample, Example, PromptExample, Segment, SegmentsExample, TextExample
from hf_clm.tokenizer import bos_token, control_pattern


def to_segments(
    example: Example,
    tokenizer: PreTrainedTokenizerFast,
    *,
    train_on: str = "all_turns",
    special_tokens_in_text: str = "encode_as_text",
) -> list[Segment]:
    """The segments of an example; every target ends in a stop token.

    Args:
        train_on: which turns of a chat are targets: ``all_turns``, ``last_turn`` or ``everything``.
        special_tokens_in_text: what becomes of a control token spelled in the user's text:
            ``encode_as_text``, ``error`` (DataError) or ``allow`` (it is that token).
    """
    if special_tokens_in_text == "error":
        check_no_control_text(example, tokenizer)
    allow = special_tokens_in_text == "allow"
    if isinstance(example, ChatExample):
        mark = None if allow else (lambda text: mark_control_text(text, tokenizer))
        return render_chat(example.messages, tokenizer, train_on=train_on, mark=mark)
    runs = _join(_text_segments(example))
    segments = [piece for run in runs for piece in ([run.segment] if allow else _protect(run, tokenizer))]
    is_open = bool(runs) and runs[-1].segment.is_target and not runs[-1].ends_in(str(tokenizer.eos_token))
    stop = [Segment(str(tokenizer.eos_token), True)] if is_open else []
    return _opening(tokenizer) + segments + stop


def to_prompt_segments(
    example: Example, tokenizer: PreTrainedTokenizerFast, *, special_tokens_in_text: str = "encode_as_text"
) -> list[Segment]:
    """The read-only segments that ``generate`` is given: the very ones before the (last) target in training.

    A document's text is its own prompt; segments are the prompt up to the last one that is learned.
    """
    allow = special_tokens_in_text == "allow"
    if isinstance(example, ChatExample):
        mark = None if allow else (lambda text: mark_control_text(text, tokenizer))
        return render_prompt(example.messages, tokenizer, mark=mark)
    runs = _join(_text_segments(example))
    if not isinstance(example, TextExample) and runs and runs[-1].segment.is_target:
        runs.pop()
    read = [_Run(Segment(run.segment.text, is_target=False), run.own) for run in runs]
    pieces = [[run.segment] if allow else _protect(run, tokenizer) for run in read]
    return _opening(tokenizer) + [part for piece in pieces for part in (BORDER, *piece)]


def to_document(example: Example) -> Example:
    """The example as pretraining sees it: one text, of which everything is learned. A chat stays a chat."""
    if isinstance(example, ChatExample):
        return ChatExample([{"role": turn["role"], "content": turn["content"]} for turn in example.messages])
    if isinstance(example, SegmentsExample) and any(segment.is_own for segment in example.segments):
        return SegmentsExample([replace(segment, is_target=True) for segment in example.segments])
    return TextExample("".join(segment.text for segment in _text_segments(example)))


def control_texts(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Every control token that the user's text spells, in order."""
    if isinstance(example, ChatExample):
        texts = [message["content"] for message in example.messages]
        return [found for text in texts for found in control_pattern(tokenizer).findall(text)]
    runs, pattern = _join(_text_segments(example)), control_pattern(tokenizer)
    return [
        match[0]
        for run in runs
        for match in pattern.finditer(run.segment.text)
        if not lies_in(match, run.own)
    ]


def may_spell_control(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> bool:
    """False where no text holds a control token or a mark of one: one search for many texts.

    True may be a false alarm, where two neighbours spell one together.
    """
    joined = "\n".join(texts)
    is_marked = MARK_START in joined or MARK_END in joined
    return is_marked or control_pattern(tokenizer).search(joined) is not None


def whole_text(example: Example) -> str:
    """All of an example's own text, in order."""
    if isinstance(example, ChatExample):
        return "\n".join(message["content"] for message in example.messages)
    return "".join(segment.text for segment in _text_segments(example))


def check_no_control_text(example: Example, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises DataError if the user's text spells a control token."""
    found = control_texts(example, tokenizer)
    if found:
        fix = "remove it, or set data.special_tokens_in_text to encode_as_text or allow"
        raise DataError("the text holds a control token", got=repr(found[0]), fix=fix)


def _text_segments(example: Example) -> list[Segment]:
    if isinstance(example, TextExample):
        return [Segment(example.text, True)]
    if isinstance(example, PromptExample):
        return [Segment(example.prompt, False), Segment(example.completion, True)]
    assert isinstance(example, SegmentsExample), type(example)
    return list(example.segments)


class _Run(NamedTuple):
    """Neighbours of one kind as one segment, and where the recipe's template wrote in it."""

    segment: Segment
    own: list[Span]

    def ends_in(self, token: str) -> bool:
        """Whether the template itself closes the run with ``token``."""
        text = self.segment.text
        starts = [start for start, end in self.own if end == len(text)]
        return text.endswith(token) and any(start <= len(text) - len(token) for start in starts)


def _join(segments: list[Segment]) -> list[_Run]:
    """Joins equal neighbours: how the user cut a text changes no id and hides no control token."""
    runs = []
    for is_target, group in groupby(segments, key=lambda segment: segment.is_target):
        text, own = "", []
        for segment in group:
            if segment.is_own:
                own.append((len(text), len(text) + len(segment.text)))
            text += segment.text
        runs.append(_Run(Segment(text, is_target), own))
    return [run for run in runs if run.segment.text]


def _protect(run: _Run, tokenizer: PreTrainedTokenizerFast) -> list[Segment]:
    marked = mark_control_text(run.segment.text, tokenizer, own=run.own)
    return split_marked(marked, is_target=run.segment.is_target)


def _opening(tokenizer: PreTrainedTokenizerFast) -> list[Segment]:
    """The start token, where the tokenizer begins every text with one. A chat template writes its own."""
    token = bos_token(tokenizer)
    return [Segment(token, is_target=False), BORDER] if token else []
