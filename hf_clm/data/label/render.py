"""Examples to pieces: what is learned, what is only read, and what each piece is encoded after.

    Document   <bos> | Translate: chat | Katze<eos>
    weight       0   |        0        |     1
    Chat       <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n | Hello!<|im_end|> | \\n<|im_st...
    weight                              0                              |        1         |     0

A chat is one row with several targets where the prompt of each turn begins, id for id, with the prompt and
the target before it. Where its template rewrites earlier turns it is a row for each turn.
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
from hf_clm.text.chat import ChatRenderer, Reasoning, Turn
from hf_clm.text.encode import Encoder, Piece, Span
from hf_clm.text.tokenizer import bos_token

Policy = Literal["encode_as_text", "error", "allow"]
APART = "a row for each turn"
SHOWN = 60  # characters of a text in an error
END_WRITTEN = "an end token written by hand"
UNANSWERED = "nothing is learned after the last answer"


@dataclass(frozen=True)
class TrainOn:
    """Which turns of a chat, or segments of a document, are learned; and whether reasoning is."""

    turns: Literal["all", "last", "everything"] = "all"
    reasoning: bool = True


@dataclass(frozen=True)
class LabelOptions:
    """What decides how an example is labelled.

    max_length: tokens of a row; None keeps every row whole.
    overflow: for a longer row; see ``labels.fit``.
    window: (size, step) in tokens cuts a document into overlapping rows instead.
    special_tokens_in_text: for control tokens that a text spells: ``encode_as_text``, ``error`` (DataError)
        or ``allow`` (they are those tokens).
    reasoning: for reasoning that the chat template has no place for; see ``ChatRenderer``.
    """

    stage: Literal["sft", "pretrain"] = "sft"
    max_length: int | None = None
    overflow: str = "keep_target"
    window: tuple[int, int] | None = None
    train_on: TrainOn = field(default_factory=TrainOn)
    special_tokens_in_text: Policy = "encode_as_text"
    reasoning: Reasoning = "refuse"


@dataclass
class Plan:
    """The pieces of the rows of an example. ``turns``: of a chat, so that it can be cut."""

    rows: list[list[Piece]]
    notes: list[str] = field(default_factory=list)
    apart: list[list[Piece]] | None = None  # the rows of a chat, should its turns not continue one another


class Renderer:
    """Plans the rows of examples with one tokenizer.

    Raises ModelError for a tokenizer without an end token.
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

    def plan(self, example: Example, *, may_spell: bool = True) -> Plan:
        """The rows of an example; none where nothing is learned.

        Args:
            may_spell: False where no text of it holds a control token: then none is looked for.

        Raises DataError where the template or the policy for control tokens refuses the example.
        """
        notes: list[str] = []
        if may_spell:
            example, is_cut = self._without_end(example)
            notes += [END_WRITTEN] * is_cut
            if self.options.special_tokens_in_text == "error":
                self._refuse_control_text(example)
        before = Counter(self.chats.notes)
        plan = self._plan_chat(example) if isinstance(example, Chat) else Plan([self._document(example)])
        plan.notes += [*notes, *(self.chats.notes - before)]
        return plan

    def prompt(self, example: Example) -> list[Piece]:
        """What ``generate`` is given: the very pieces before the (last) target in training.

        A document that is learned whole is its own prompt.
        """
        if isinstance(example, Chat):
            return [Piece(self.chats.prompt(example))]
        segments = example.segments
        if not example.is_text:
            last = max((n for n, s in enumerate(segments, start=1) if not s.is_target), default=0)
            segments = segments[:last]
        return [piece._replace(weight=0.0) for piece in self._pieces(segments)]  # cut as in training

    def control_texts(self, example: AnyExample) -> list[str]:
        """Every control token that the example's text spells, in order."""
        found = []
        if isinstance(example, Chat):
            found += self.encoder.any_control.findall(json.dumps(example.tools, ensure_ascii=False))
            for message in example.messages:
                by_model = message["role"] == "assistant"
                pattern = self.encoder.special if by_model else self.encoder.any_control
                for text in Chat([message]).texts:
                    found += pattern.findall(text)
            return found
        if isinstance(example, Tokens):
            return []
        for _, text, own, by_model in _runs(example.segments):
            pattern = self.encoder.special if by_model else self.encoder.any_control
            matches = pattern.finditer(text)
            found += [m[0] for m in matches if not any(a <= m.start() and m.end() <= b for a, b in own)]
        return found

    def _plan_chat(self, chat: Chat) -> Plan:
        learns_all = self.options.stage == "pretrain" or self.options.train_on.turns == "everything"
        if learns_all and all("weight" not in message for message in chat.messages):
            return Plan([[Piece(self.chats.full_text(chat), 1.0)]])
        turns = self.chats.turns(chat)
        weights = [self._weight(chat.messages[turn.message], turn is turns[-1]) for turn in turns]
        if not any(weights) and not learns_all:
            return Plan([])
        joined, apart = self._join(turns, weights, learns_all=learns_all), self._part(turns, weights)
        if joined is None and learns_all:
            fix = "remove the weights of its messages, or learn the answers only"
            raise DataError("the chat template rewrites earlier turns: not all of it can be learned", fix=fix)
        notes = [] if learns_all or chat.messages[-1]["role"] == "assistant" else [UNANSWERED]
        if joined is None:
            return Plan(apart, [*notes, *([APART] if len(turns) > 1 else [])])
        return Plan([joined], notes, apart=None if learns_all or len(turns) == 1 else apart)

    def _join(self, turns: list[Turn], weights: list[float], *, learns_all: bool) -> list[Piece] | None:
        """All turns in one row; None where a prompt does not begin with the turn before it."""
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

    def _part(self, turns: list[Turn], weights: list[float]) -> list[list[Piece]]:
        """A row for each turn that is learned."""
        both = zip(turns, weights, strict=True)
        return [[Piece(turn.prompt), *self._target(turn, weight)] for turn, weight in both if weight]

    def _target(self, turn: Turn, weight: float, *, must_join: bool = False) -> list[Piece]:
        """The target of a turn; its reasoning apart where that is only read."""
        context = self.encoder.last_context(turn.prompt)
        if self.options.train_on.reasoning or not turn.reasoning_end:
            return [Piece(turn.target, weight, context, must_join)]
        reasoning, answer = turn.target[: turn.reasoning_end], turn.target[turn.reasoning_end :]
        after = self.encoder.last_context(turn.prompt + reasoning)
        return [Piece(reasoning, 0.0, context, must_join), Piece(answer, weight, after, must_join)]

    def _weight(self, message: Message, is_last: bool) -> float:
        is_chosen = is_last or self.options.train_on.turns != "last"
        return message.get("weight", 1.0) if is_chosen else 0.0

    def _document(self, document: Document) -> list[Piece]:
        """The pieces of a document; what is learned last ends in the end token."""
        segments = document.segments
        if self.options.stage == "pretrain" or self.options.train_on.turns == "everything":
            segments = document.as_targets().segments
        if self.options.train_on.turns == "last":
            last = max((n for n, s in enumerate(segments) if not s.is_target), default=-1)
            segments = [replace(s, weight=0.0) if n < last else s for n, s in enumerate(segments)]
        segments = [segment for segment in segments if segment.text]
        if segments and segments[-1].is_target:
            last = segments[-1]
            if not (last.is_own and last.text.endswith(self.eos)):  # a template may write it itself
                segments = [*segments, Segment(self.eos, last.weight, is_own=True)]
        return self._pieces(segments)

    def _pieces(self, segments: Sequence[Segment]) -> list[Piece]:
        """Neighbours of one weight are one piece: how a user cut a text changes no id."""
        pieces = [Piece(self.bos)] if self.bos else []
        first = len(pieces)
        for weight, text, own, by_model in _runs(segments):
            marked = self.encoder.mark(text, by_model=by_model, own=own) if self.protects else text
            pieces.append(Piece(marked, weight, None if len(pieces) > first else ""))
        return pieces

    def _without_end(self, example: Example) -> tuple[Example, bool]:
        """The example without an end token that its text has written after what is learned."""
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
        found = self.control_texts(example)
        if found:
            fix = "remove it, or set data.special_tokens_in_text to encode_as_text or allow"
            raise DataError("the text holds a control token", got=repr(found[0]), fix=fix)


def check_control_tokens(encoder: Encoder) -> None:
    """Raises ModelError for an end or pad token that is ordinary text: each in a text would be that token."""
    tokenizer = encoder.tokenizer
    for name in ("eos_token", "pad_token"):
        token: Any = getattr(tokenizer, name)
        if token is not None and (not token.strip() or encoder.is_ordinary(token)):
            what = f"its {name} {token!r} is ordinary text"
            raise ModelError(what, where="tokenizer", fix=f"set tokenizer.{name} to a token of its own")


def check_not_rendered(
    renderer: Renderer, examples: Iterable[AnyExample], *, spelled: int, total: int
) -> None:
    """Raises DataError where most of a block are chats that were rendered to text already.

    They begin with a control token and hold more of them: each would be spelled letter by letter.

    Args:
        spelled: how many examples of the block spell a control token.
        total: how many there are.
    """
    if renderer.options.special_tokens_in_text != "encode_as_text" or 2 * spelled <= total:
        return
    special = renderer.encoder.special
    texts = [_text(example).lstrip() for example in examples if isinstance(example, Document)]
    rendered = [text for text in texts if special.match(text) and len(special.findall(text)) > 1]
    if 2 * len(rendered) > total:
        raise DataError(
            f"{len(rendered):,} of {total:,} texts are rendered already: they spell control tokens",
            got=repr(rendered[0][:SHOWN]),
            fix="give messages, or learn these as tokens with data.special_tokens_in_text: allow",
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
    """(weight, text, what the recipe wrote in it, whether the model writes it), by neighbours of a weight."""
    for weight, group in groupby(segments, key=lambda segment: segment.weight):
        text, own = "", []
        for segment in group:
            if segment.is_own:
                own.append((len(text), len(text) + len(segment.text)))
            text += segment.text
        if text:
            yield weight, text, own, weight > 0
