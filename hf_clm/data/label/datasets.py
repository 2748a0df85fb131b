"""Map-style datasets of rows: every example labelled, fitted to ``max_length`` and accounted for."""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from hf_clm.data.label.labels import (
    Fate,
    Rows,
    encode_plans,
    fit,
    fit_chat,
    fit_windows,
    tokens_to_rows,
    weigh,
)
from hf_clm.data.label.render import LabelOptions, Plan, Policy, Renderer, TrainOn, check_not_rendered
from hf_clm.data.read.formats import FirstSeen, ReadRecord, check_same_masks, detect_format, to_example
from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Recipe, Source
from hf_clm.schema import AnyExample, Chat, Format, TokenizedExample, Tokens, whole_text
from hf_clm.text.chat import Reasoning
from hf_clm.text.encode import Encoder
from hf_clm.text.tokenizer import find_unknown, unknown_id

COLLECTED_EVERY = 50_000  # new objects; Python's own 700 suit a program that keeps few
BATCH_ROWS = 1000  # examples in one call of the tokenizer: enough to keep its threads busy, little memory
TRAIN_ON = {"all_turns": TrainOn("all"), "last_turn": TrainOn("last"), "everything": TrainOn("everything")}

UNREADABLE = "unreadable"  # the fate of an example that cannot be used
Views = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray] | None]  # ids, labels, weights
SHOWN_LETTERS = 8  # of a word that the tokenizer cannot spell

Record = Mapping[str, Any]
Faults = dict[int, DataError] | None  # why an example cannot be used, by its number


def label_options(recipe: Recipe, source: Source | None = None) -> LabelOptions:
    """What decides how the examples of a recipe, or of one of its sources, are labelled."""
    data, packing = recipe.data, recipe.resolved_packing
    train_on = data.train_on
    is_named = isinstance(train_on, str)
    learned = TRAIN_ON[train_on] if is_named else TrainOn(train_on.turns, train_on.reasoning)
    return LabelOptions(
        stage=recipe.stage,
        max_length=None if packing == "stream" else data.max_length,  # a stream cuts by itself
        overflow=(source.overflow if source else None) or recipe.resolved_overflow,
        window=(data.window.size, data.window.step) if data.window else None,
        train_on=learned,
        special_tokens_in_text=data.special_tokens_in_text,
        reasoning=data.reasoning,
    )


@dataclass
class TokenizedRows:
    """Token ids and labels of many rows in flat arrays, and what became of every example.

    N = rows, S = tokens of all rows.

        input_ids, labels  (S,) int32
        offsets            (N + 1,) int64: row i is offsets[i]:offsets[i + 1]
        sources            (N,) int64: the example that row i came from
        weights            (S,) float32, how much the loss of each label counts; None: 1 everywhere
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    sources: np.ndarray
    fates: Sequence[Fate] = field(default_factory=list)
    control_texts: Counter[str] = field(default_factory=Counter)
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> TokenizedExample:
        number = range(len(self))[index]  # takes negative indices, raises IndexError past the end
        return self._cut(*self.offsets[number : number + 2])

    def views(self, numbers: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Views:
        """Ids, labels and weights of tokens ``starts[i]`` to ``stops[i]`` of the rows, not copied."""
        begins = self.offsets[numbers]
        firsts, lasts = (begins + starts).tolist(), (begins + stops).tolist()
        spans = [slice(first, last) for first, last in zip(firsts, lasts, strict=True)]
        ids, labels = [self.input_ids[span] for span in spans], [self.labels[span] for span in spans]
        return ids, labels, None if self.weights is None else [self.weights[span] for span in spans]

    def _cut(self, start: int, stop: int) -> TokenizedExample:
        row: TokenizedExample = {
            "input_ids": self.input_ids[start:stop].tolist(),
            "labels": self.labels[start:stop].tolist(),
        }
        if self.weights is not None:
            row["weights"] = self.weights[start:stop].tolist()
        return row

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens of each row."""
        return np.diff(self.offsets)


class AnyRows(Protocol):
    """Rows in memory (``TokenizedRows``) or in a mapped file (``StoredRows``)."""

    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def sources(self) -> np.ndarray: ...
    @property
    def fates(self) -> Sequence[Fate]: ...
    @property
    def control_texts(self) -> Counter[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> TokenizedExample: ...
    def views(self, numbers: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Views: ...


class TokenizedDataset(torch.utils.data.Dataset):
    """Rows that are tokenized already: ``dataset[i]`` is a TokenizedExample."""

    def __init__(self, rows: AnyRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.rows[index]

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens of each row."""
        return self.rows.lengths


class SFTDataset(TokenizedDataset):
    """Rows of which only the targets are learned: completions, assistant turns, segments marked ``train``.

    Args:
        records: plain records, a ``datasets.Dataset``, or examples (``Chat``, ``Document``, ``Tokens``).
        format: of plain records: a name, ``"module:function"``, or a function from a record to a ``Chat`` or
            a ``Document``; None tells it from the keys of each. Prompts and completions become turns where
            the tokenizer has a chat template; ``to_example(..., render="plain")`` makes texts of them.
        max_length: tokens; None keeps every row whole.
        overflow: for a longer row: ``keep_target``, ``truncate``, ``drop``, ``error`` or ``split`` (see fit).
        train_on: ``all_turns``, ``last_turn``, ``everything``, or a ``TrainOn``.

    ``dataset[i]`` is a TokenizedExample; ``dataset.rows.fates`` says what became of each example.
    """

    def __init__(
        self,
        records: Iterable[AnyExample | Record],
        tokenizer: PreTrainedTokenizerFast,
        *,
        format: Format | str | ReadRecord | None = None,
        max_length: int | None = None,
        overflow: str = "keep_target",
        train_on: str | TrainOn = "all_turns",
        special_tokens_in_text: Policy = "encode_as_text",
        reasoning: Reasoning = "refuse",
    ):
        options = LabelOptions(
            max_length=max_length,
            overflow=overflow,
            train_on=TRAIN_ON[train_on] if isinstance(train_on, str) else train_on,
            special_tokens_in_text=special_tokens_in_text,
            reasoning=reasoning,
        )
        super().__init__(tokenize_rows(to_examples(records, tokenizer, format), tokenizer, options))


class PretrainDataset(TokenizedDataset):
    """Documents that are learned whole, whatever kind of example they come as.

    Args:
        records, format, max_length: as in SFTDataset.
        overflow: as in SFTDataset; ``split`` makes several rows of a long document and loses no label.
        window: ``(size, step)`` in tokens cuts each document into overlapping windows instead.

    ``dataset[i]`` is a TokenizedExample.
    """

    def __init__(
        self,
        records: Iterable[AnyExample | Record],
        tokenizer: PreTrainedTokenizerFast,
        *,
        format: Format | str | ReadRecord | None = None,
        max_length: int | None = None,
        overflow: str = "split",
        window: tuple[int, int] | None = None,
        special_tokens_in_text: Policy = "encode_as_text",
    ):
        options = LabelOptions(
            stage="pretrain",
            max_length=max_length,
            overflow=overflow,
            window=window,
            special_tokens_in_text=special_tokens_in_text,
        )
        super().__init__(tokenize_rows(to_examples(records, tokenizer, format), tokenizer, options))


def to_examples(
    records: Iterable[AnyExample | Record],
    tokenizer: PreTrainedTokenizerFast,
    format: Format | str | ReadRecord | None,
) -> Iterator[AnyExample]:
    """Examples as they are, records by their format. Raises DataError with the number of the record."""
    render = "chat" if tokenizer.chat_template else "plain"
    first: FirstSeen = {}
    for number, record in enumerate(records):
        if isinstance(record, Mapping):
            where = f"record {number}"
            with _named(number):
                known = format or detect_format(record, where)
                if known == "tokenized":
                    check_same_masks(record, where, first=first)
                yield to_example(record, format=known, where=where, render=render)
        else:
            yield record


@contextmanager
def rare_collection() -> Iterator[None]:
    """Looks for garbage less often: it would walk over all examples again and again (measured: 10-20 %)."""
    before = gc.get_threshold()
    gc.set_threshold(COLLECTED_EVERY, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@rare_collection()
def tokenize_rows(
    examples: Iterable[AnyExample],
    tokenizer: PreTrainedTokenizerFast,
    options: LabelOptions,
    *,
    faults: Faults = None,
) -> TokenizedRows:
    """Labels, encodes and fits all examples.

    Args:
        faults: takes the error of each example that cannot be used, by its number; None: the first is raised.

    Raises DataError, with the example's number in ``row``, where one cannot be read or spelled.
    """
    renderer = Renderer(tokenizer, options)
    written = _Written()
    numbered = enumerate(examples)
    while batch := list(islice(numbered, BATCH_ROWS)):
        plans = _plan(batch, renderer, written.control_texts, faults)
        rows_of = _encode(plans, renderer.encoder, faults)
        for number, example in batch:
            rows, fate, notes = [], Fate(UNREADABLE), []
            with _named(number, faults):
                if isinstance(example, Tokens):
                    rows, fate = _fit_weighed(example, tokens_to_rows(example, tokenizer), renderer)
                elif number in rows_of:  # else it has a fault already
                    check_spelled(example, rows_of[number], tokenizer)
                    rows, fate = _fit_weighed(example, rows_of[number], renderer)
                    notes = plans[number].notes
            written.add(number, rows, fate, notes)
    return written.to_rows()


def check_spelled(example: AnyExample, rows: Rows, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises DataError for a character that the tokenizer has no token for."""
    unknown = unknown_id(tokenizer)
    if unknown is None or not any(unknown in row["input_ids"] for row in rows):
        return
    if (found := find_unknown(whole_text(example), tokenizer)) is not None:
        raise unspelled(found)


def unspelled(text: str, *, where: str = "") -> DataError:
    """The error for ``text``, which the tokenizer has no token for."""
    codes = " ".join(f"U+{ord(letter):04X}" for letter in text[:SHOWN_LETTERS])
    fix = "take it out, or add a text that holds it to those that the tokenizer is trained on"
    return DataError("the tokenizer has no token for it", where=where, got=f"{text!r} ({codes})", fix=fix)


class _Written:
    """The rows so far, in pieces."""

    def __init__(self):
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        self.sources: list[int] = []
        self.fates: list[Fate] = []
        self.control_texts: Counter[str] = Counter()

    def add(self, number: int, rows: Rows, fate: Fate, notes: Sequence[str]) -> None:
        reasons = [*notes, fate.reason] if fate.kind != "dropped" else [fate.reason]
        self.fates.append(replace(fate, reason="; ".join(filter(None, reasons))) if notes else fate)
        self.sources += [number] * len(rows)
        for row in rows:
            weights = row.get("weights")
            ids, labels = (np.asarray(row[key], dtype=np.int32) for key in ("input_ids", "labels"))
            self.rows.append((ids, labels, None if weights is None else np.asarray(weights, np.float32)))

    def to_rows(self) -> TokenizedRows:
        """Flat arrays of all of them; without weights where every label counts 1."""
        lengths = [len(ids) for ids, _, _ in self.rows]
        none = np.zeros(0, np.int32)
        ids = np.concatenate([none, *(ids for ids, _, _ in self.rows)])
        labels = np.concatenate([none, *(labels for _, labels, _ in self.rows)])
        weights = None
        if any(weight is not None for _, _, weight in self.rows):
            parts = [np.ones(len(ids), np.float32) if w is None else w for ids, _, w in self.rows]
            weights = np.concatenate(parts)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        sources = np.array(self.sources, dtype=np.int64)
        return TokenizedRows(ids, labels, offsets, sources, self.fates, self.control_texts, weights)


def _plan(
    batch: Sequence[tuple[int, AnyExample]], renderer: Renderer, control_texts: Counter[str], faults: Faults
) -> dict[int, Plan]:
    """The plan of each example that is text; control tokens are looked for where one may be.

    Counts what is spelled in ``control_texts``.
    """
    texts = {number: whole_text(example) for number, example in batch if not isinstance(example, Tokens)}
    may_spell: set[int] = set()
    if renderer.encoder.may_spell(texts.values()):  # one search where, as mostly, none does
        may_spell = {number for number, text in texts.items() if renderer.encoder.may_spell([text])}
        spelling = [example for number, example in batch if number in may_spell]
        for example in spelling:
            control_texts.update(renderer.control_texts(example))
        if batch[0][0] == 0 or len(batch) == BATCH_ROWS:  # a few last examples say nothing of the set
            check_not_rendered(renderer, spelling, spelled=len(spelling), total=len(batch))
    plans = {}
    for number, example in batch:
        if not isinstance(example, Tokens):
            with _named(number, faults):
                plans[number] = renderer.plan(example, may_spell=number in may_spell)
    return plans


def _encode(plans: Mapping[int, Plan], encoder: Encoder, faults: Faults) -> dict[int, Rows]:
    """The rows of each plan. Raises DataError with the number of the example that cannot be encoded."""
    try:
        return dict(zip(plans, encode_plans(list(plans.values()), encoder), strict=True))
    except DataError:
        rows = {}
        for number, plan in plans.items():
            with _named(number, faults):
                rows[number] = encode_plans([plan], encoder)[0]
        return rows


def _fit_weighed(example: AnyExample, rows: Rows, renderer: Renderer) -> tuple[Rows, Fate]:
    if example.weight == 0:
        tokens = sum(len(row["input_ids"]) for row in rows)
        return [], Fate("dropped", "no target token", tokens=tokens)
    rows, fate = _fit(example, rows, renderer)
    return weigh(rows, example.weight), fate


def _fit(example: AnyExample, rows: Rows, renderer: Renderer) -> tuple[Rows, Fate]:
    options = renderer.options
    limit = options.max_length
    if options.window:
        return fit_windows(rows, size=options.window[0], step=options.window[1])
    is_over = limit is not None and any(len(row["input_ids"]) > limit for row in rows)
    cuts_turns = options.overflow == "keep_target" and options.stage == "sft"
    if is_over and isinstance(example, Chat) and cuts_turns and any(map(_has_target, rows)):
        return fit_chat(example, rows, renderer, max_length=cast(int, limit))
    keeps = int(renderer.bos is not None and not isinstance(example, Tokens))
    return fit(rows, limit, overflow=options.overflow, keeps=keeps)


def _has_target(row: TokenizedExample) -> bool:
    return any(label >= 0 for label in row["labels"])


@contextmanager
def _named(number: int, faults: Faults = None) -> Iterator[None]:
    """Puts the number of the example into a DataError, so that the caller can name its file and line."""
    try:
        yield
    except DataError as error:
        error.row = number
        if faults is None:
            raise
        faults[number] = error
