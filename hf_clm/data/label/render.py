"""Renders examples as pieces with a weight (target or context) and the context to encode them in.

    Document   <bos> | Translate: chat | Katze<eos>
    weight       0   |        0        |     1
    Chat       <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n | Hello!<|im_end|> | \\n<|im_st...
    weight                              0                              |        1         |     0

A chat is one row with several targets if the prompt of each turn begins, id for id, with the previous prompt
and target. If its template rewrites earlier turns, it is one row per turn.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from hf_clm.errors import DataError, ModelError
from hf_clm.schema import AnyExample, Chat, Document, Example, Message, Segment, Tokens
from hf_clm.text.chat import EXCERPT_LENGTH, AssistantTurn, ChatRenderer, Reasoning
from hf_clm.text.encode import Encoder, Piece, Span
from hf_clm.text.tokenizer import bos_token

Policy = Literal["encode_as_text", "error", "allow"]
APART = "a row for each turn"
END_WRITTEN = "an end token written by hand"
UNANSWERED = "nothing is learned after the last answer"


@dataclass(frozen=True)
class TrainOn:
    """Which turns of a chat or segments of a document are targets, and whether reasoning is."""

    turns: Literal["all", "last", "everything"] = "all"
    reasoning: bool = True


@dataclass(frozen=True)
class LabelOptions:
    """Options that decide how an example is labelled.

    max_length: maximum length of a row in tokens; None for no limit.
    overflow: what to do with longer rows; see ``labels.fit``.
    window: (size, step) in tokens; splits a document into overlapping rows instead.
    special_tokens_in_text: how to treat control tokens in a record's text: ``encode_as_text``, ``error``
        (DataError) or ``allow`` (encode them as control tokens).
    reasoning: what to do with reasoning if the chat template has no place for it; see ``ChatRenderer``.
    """

    stage: Literal["sft", "pretrain"] = "sft"
    max_length: int | None = None
    overflow: str = "keep_target"
    window: tuple[int, int] | None = None
    train_on: TrainOn = field(default_factory=TrainOn)
    special_tokens_in_text: Policy = "encode_as_text"
    reasoning: Reasoning = "refuse"


@dataclass
class RowPlan:
    """The pieces of each row of an example.

    ``apart``: one row per turn, in case the turns of a chat turn out not to continue one another.
    """

    rows: list[list[Piece]]
    notes: list[str] = field(default_factory=list)
    apart: list[list[Piece]] | None = None


class Renderer:
    """Plans the rows of examples for a tokenizer.

    Raises ModelError if the tokenizer has no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: LabelOptions):
        if tokenizer.eos_token is None:
            raise ModelError("has no end token", where="tokenizer", fix="set its eos_token")
        self.tokenizer, self.options = tokenizer, options
        self.eos, self.bos = str(tokenizer.eos_token), bos_token(tokenizer)
        self.encoder = Encoder(tokenizer)
        check_control_tokens(self.encoder)
        self.protects = options.special_tokens_in_text != "allow"
        self.chats = ChatRenderer(self.encoder, protects=self.protects, reasoning=options.reasoning)

    def plan(self, example: Example, *, may_have_control: bool = True) -> RowPlan:
        """Plans the rows of an example; no rows if it has no targets.

        Args:
            may_have_control: False skips the search for control tokens in its texts.

        Raises DataError if the template or the policy for control tokens refuses the example.
        """
        notes: list[str] = []
        if may_have_control:
            example, is_cut = self._without_end(example)
            notes += [END_WRITTEN] * is_cut
            if self.options.special_tokens_in_text == "error":
                self._refuse_control_text(example)
        before = Counter(self.chats.notes)
        plan = self._plan_chat(example) if isinstance(example, Chat) else RowPlan([self._document(example)])
        plan.notes += [*notes, *(self.chats.notes - before)]
        return plan

    def prompt(self, example: Example) -> list[Piece]:
        """Returns the input of ``generate``: the same pieces as before the (last) target in training.

        A document without context is used as the prompt.
        """
        if isinstance(example, Chat):
            return [Piece(self.chats.prompt(example))]
        segments = example.segments
        if not example.is_text:
            last = max((n for n, s in enumerate(segments, start=1) if not s.is_target), default=0)
            segments = segments[:last]
        return [piece._replace(weight=0.0) for piece in self._pieces(segments)]

    def control_texts(self, example: AnyExample) -> list[str]:
        """Returns every control token in the example's text, in order."""
        tokens = []
        if isinstance(example, Chat):
            tokens += self.encoder.any_control.findall(json.dumps(example.tools, ensure_ascii=False))
            for message in example.messages:
                by_model = message["role"] == "assistant"
                pattern = self.encoder.special if by_model else self.encoder.any_control
                for text in Chat([message]).texts:
                    tokens += pattern.findall(text)
            return tokens
        if isinstance(example, Tokens):
            return []
        for _, text, recipe_spans, by_model in _runs(example.segments):
            pattern = self.encoder.special if by_model else self.encoder.any_control
            matches = pattern.finditer(text)
            tokens += [
                m[0] for m in matches if not any(a <= m.start() and m.end() <= b for a, b in recipe_spans)
            ]
        return tokens

    def _plan_chat(self, chat: Chat) -> RowPlan:
        learns_all = self.options.stage == "pretrain" or self.options.train_on.turns == "everything"
        if learns_all and all("weight" not in message for message in chat.messages):
            return RowPlan([[Piece(self.chats.full_text(chat), 1.0)]])
        turns = self.chats.turns(chat)
        weights = [self._weight(chat.messages[turn.message], turn is turns[-1]) for turn in turns]
        if not any(weights) and not learns_all:
            return RowPlan([])
        joined, apart = self._join(turns, weights, learns_all=learns_all), self._part(turns, weights)
        if joined is None and learns_all:
            fix = "remove the weights of its messages, or train on the answers only"
            what = "the chat template rewrites earlier turns, so the whole chat cannot be a target"
            raise DataError(what, fix=fix)
        notes = [] if learns_all or chat.messages[-1]["role"] == "assistant" else [UNANSWERED]
        if joined is None:
            return RowPlan(apart, [*notes, *([APART] if len(turns) > 1 else [])])
        return RowPlan([joined], notes, apart=None if learns_all or len(turns) == 1 else apart)

    def _join(
        self, turns: list[AssistantTurn], weights: list[float], *, learns_all: bool
    ) -> list[Piece] | None:
        """Joins all turns in one row; returns None if a prompt does not begin with the turns before it."""
        pieces: list[Piece] = []
        last = max(number for number, weight in enumerate(weights) if weight or learns_all)
        for number, (turn, weight) in enumerate(zip(turns[: last + 1], weights, strict=False)):
            context = ""
            text = turn.prompt
            if number:
                before = turns[number - 1]
                done = before.prompt + before.target
                if not before.end or not text.startswith(done):
                    return None
                context, text = before.end, text[len(done) :]
            pieces.append(Piece(text, float(learns_all), context, must_join=number > 0))
            pieces += self._target(turn, weight, must_join=number < last)
        return pieces

    def _part(self, turns: list[AssistantTurn], weights: list[float]) -> list[list[Piece]]:
        """Returns a row for each turn with a weight."""
        both = zip(turns, weights, strict=True)
        return [[Piece(turn.prompt), *self._target(turn, weight)] for turn, weight in both if weight]

    def _target(self, turn: AssistantTurn, weight: float, *, must_join: bool = False) -> list[Piece]:
        """Returns the target of a turn, with the reasoning as context if it is not trained on."""
        context = self.encoder.last_context(turn.prompt)
        if self.options.train_on.reasoning or not turn.reasoning_end:
            return [Piece(turn.target, weight, context, must_join)]
        reasoning, answer = turn.target[: turn.reasoning_end], turn.target[turn.reasoning_end :]
        after = self.encoder.last_context(turn.prompt + reasoning)
        return [Piece(reasoning, 0.0, context, must_join), Piece(answer, weight, after, must_join)]

    def _weight(self, message: Message, is_last: bool) -> float:
        is_target = is_last or self.options.train_on.turns != "last"
        return message.get("weight", 1.0) if is_target else 0.0

    def _document(self, document: Document) -> list[Piece]:
        """Returns the pieces of a document; a target at its end is closed with the end token."""
        segments = document.segments
        if self.options.stage == "pretrain" or self.options.train_on.turns == "everything":
            segments = document.as_targets().segments
        if self.options.train_on.turns == "last":
            last = max((n for n, s in enumerate(segments) if not s.is_target), default=-1)
            segments = [replace(s, weight=0.0) if n < last else s for n, s in enumerate(segments)]
        segments = [segment for segment in segments if segment.text]
        if segments and segments[-1].is_target:
            last = segments[-1]
            if not (last.is_own and last.text.endswith(self.eos)):  # a template may already add it
                segments = [*segments, Segment(self.eos, last.weight, is_own=True)]
        return self._pieces(segments)

    def _pieces(self, segments: Sequence[Segment]) -> list[Piece]:
        """Joins adjacent segments of equal weight, so that the segmentation does not affect the ids."""
        pieces = [Piece(self.bos)] if self.bos else []
        first = len(pieces)
        for weight, text, recipe_spans, by_model in _runs(segments):
            if self.protects:
                text = self.encoder.mark(text, by_model=by_model, recipe_spans=recipe_spans)
            pieces.append(Piece(text, weight, None if len(pieces) > first else ""))
        return pieces

    def _without_end(self, example: Example) -> tuple[Example, bool]:
        """Removes an end token that a record's text has after its target; returns whether it did."""
        if isinstance(example, Document):
            last = example.segments[-1] if example.segments else None
            text = last.text.rstrip() if last and last.is_target and not last.is_own else ""
            if last is None or not text.endswith(self.eos) or text == self.eos:
                return example, False
            segments = [*example.segments[:-1], replace(last, text=text.removesuffix(self.eos))]
            return replace(example, segments=segments), True
        ends = tuple({self.eos, *self.chats.stops()})
        messages = [_without_suffix(message, ends) for message in example.messages]
        is_cut = any(new is not old for new, old in zip(messages, example.messages, strict=True))
        return (replace(example, messages=messages) if is_cut else example), is_cut

    def _refuse_control_text(self, example: Example) -> None:
        tokens = self.control_texts(example)
        if tokens:
            fix = "remove it, or set data.special_tokens_in_text to encode_as_text or allow"
            raise DataError("the text contains a control token", got=repr(tokens[0]), fix=fix)


def check_control_tokens(encoder: Encoder) -> None:
    """Raises ModelError if the end or pad token is ordinary text, which would be encoded as that token."""
    tokenizer = encoder.tokenizer
    for name in ("eos_token", "pad_token"):
        token: Any = getattr(tokenizer, name)
        if token is not None and (not token.strip() or encoder.is_ordinary(token)):
            what = f"the {name} {token!r} is ordinary text"
            raise ModelError(what, where="tokenizer", fix=f"set tokenizer.{name} to a special token")


def check_not_rendered(renderer: Renderer, examples: Sequence[AnyExample], *, total: int) -> None:
    """Raises DataError if most of a block are chats already rendered to text.

    Such texts begin with a control token and contain more of them; each would be encoded as plain text.

    Args:
        examples: the examples of the block that contain a control token.
        total: number of examples in the block.
    """
    if renderer.options.special_tokens_in_text != "encode_as_text" or 2 * len(examples) <= total:
        return
    special = renderer.encoder.special
    texts = [_text(example).lstrip() for example in examples if isinstance(example, Document)]
    rendered = [text for text in texts if special.match(text) and len(special.findall(text)) > 1]
    if 2 * len(rendered) > total:
        raise DataError(
            f"{len(rendered):,} of {total:,} texts are already rendered: they contain control tokens",
            got=repr(rendered[0][:EXCERPT_LENGTH]),
            fix="provide messages, or encode them as tokens with data.special_tokens_in_text: allow",
        )


def _text(document: Document) -> str:
    return "".join(segment.text for segment in document.segments if not segment.is_own)


def _without_suffix(message: Message, ends: tuple[str, ...]) -> Message:
    content = message.get("content", "").rstrip()
    if message["role"] != "assistant" or not content.endswith(ends) or content in ends:
        return message
    end = next(end for end in ends if content.endswith(end))
    return {**message, "content": content.removesuffix(end)}


def _runs(segments: Iterable[Segment]) -> Iterable[tuple[float, str, list[Span], bool]]:
    """Joins adjacent segments of equal weight.

    Yields (weight, text, spans of it that come from the recipe, whether the model generates it).
    """
    for weight, group in groupby(segments, key=lambda segment: segment.weight):
        text, recipe_spans = "", []
        for segment in group:
            if segment.is_own:
                recipe_spans.append((len(text), len(text) + len(segment.text)))
            text += segment.text
        if text:
            yield weight, text, recipe_spans, weight > 0
