"""Map-style datasets of rows: labels every example, fits it to ``max_length`` and records what happened."""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, cast

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
from hf_clm.data.label.render import LabelOptions, Policy, Renderer, RowPlan, TrainOn, check_not_rendered
from hf_clm.data.read.formats import FirstSeen, ReadRecord, check_same_masks, detect_format, to_example
from hf_clm.errors import DataError
from hf_clm.schema import AnyExample, Chat, Format, TokenizedExample, Tokens, whole_text
from hf_clm.text.chat import Reasoning
from hf_clm.text.encode import Encoder
from hf_clm.text.tokenizer import find_unknown, unknown_id

if TYPE_CHECKING:  # the datasets need no recipe
    from hf_clm.recipe.recipe import Recipe, Source

GC_THRESHOLD = 50_000  # new objects between garbage collections; Python's 700 suits programs that keep few
BATCH_EXAMPLES = 1000  # per call of the tokenizer: keeps its threads busy with little memory
TRAIN_ON = {"all_turns": TrainOn("all"), "last_turn": TrainOn("last"), "everything": TrainOn("everything")}

UNREADABLE = "unreadable"  # the fate of an example that cannot be used
Views = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray] | None]  # ids, labels, weights
LISTED_LETTERS = 8  # code points listed in an error

ErrorsByNumber = dict[int, DataError] | None  # why an example cannot be used, by its number


def label_options(recipe: "Recipe", source: "Source | None" = None) -> LabelOptions:
    """Returns the options for labelling the examples of a recipe or of one of its sources."""
    data, packing = recipe.data, recipe.resolved_packing
    train_on = data.train_on
    is_named = isinstance(train_on, str)
    selection = TRAIN_ON[train_on] if is_named else TrainOn(train_on.turns, train_on.reasoning)
    return LabelOptions(
        stage=recipe.stage,
        max_length=None if packing == "stream" else data.max_length,  # stream packing cuts rows itself
        overflow=(source.overflow if source else None) or recipe.resolved_overflow,
        window=(data.window.size, data.window.step) if data.window else None,
        train_on=selection,
        special_tokens_in_text=data.special_tokens_in_text,
        reasoning=data.reasoning,
    )


@dataclass
class TokenizedRows:
    """Token ids and labels of many rows in flat arrays, and the fate of every example.

    N = rows, S = tokens of all rows.

        input_ids, labels  (S,) int32
        offsets            (N + 1,) int64: row i is offsets[i]:offsets[i + 1]
        sources            (N,) int64: the example that row i came from
        weights            (S,) float32, factor of each label's loss; None if all are 1
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
        number = range(len(self))[index]  # accepts negative indices, raises IndexError past the end
        return self._cut(*self.offsets[number : number + 2])

    def views(self, numbers: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Views:
        """Returns views of the ids, labels and weights of tokens ``starts[i]:stops[i]`` of each row."""
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
        """(N,) int64, length of each row in tokens."""
        return np.diff(self.offsets)


class AnyRows(Protocol):
    """Rows in memory (``TokenizedRows``) or in a memory-mapped file (``StoredRows``)."""

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
    """Dataset of tokenized rows: ``dataset[i]`` is a TokenizedExample."""

    def __init__(self, rows: AnyRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.rows[index]

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, length of each row in tokens."""
        return self.rows.lengths


class SFTDataset(TokenizedDataset):
    """Dataset for fine-tuning: only targets (completions, assistant turns, ``train`` segments) have labels.

    Args:
        records: plain records, a ``datasets.Dataset``, or examples (``Chat``, ``Document``, ``Tokens``).
        format: format of plain records: a name, ``"module:function"``, or a function that converts a record
            to a ``Chat`` or a ``Document``; None detects it from the keys of each record. Prompts and
            completions become chat turns if the tokenizer has a chat template; for plain text use
            ``to_example(..., render="plain")``.
        max_length: maximum length of a row in tokens; None for no limit.
        overflow: what to do with longer rows: ``keep_target``, ``truncate``, ``drop``, ``error`` or
            ``split`` (see ``fit``).
        train_on: ``all_turns``, ``last_turn``, ``everything``, or a ``TrainOn``.

    ``dataset[i]`` is a TokenizedExample; ``dataset.rows.fates`` has the fate of each example.
    """

    def __init__(
        self,
        records: Iterable[AnyExample | Mapping[str, Any]],
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
    """Dataset for pretraining: every token has a label, whatever kind of example it comes from.

    Args:
        records, format, max_length: as in SFTDataset.
        overflow: as in SFTDataset; ``split`` splits a long document into several rows without losing a label.
        window: ``(size, step)`` in tokens; splits each document into overlapping windows instead.

    ``dataset[i]`` is a TokenizedExample.
    """

    def __init__(
        self,
        records: Iterable[AnyExample | Mapping[str, Any]],
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
    records: Iterable[AnyExample | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    format: Format | str | ReadRecord | None,
) -> Iterator[AnyExample]:
    """Converts records to examples; passes examples through. DataErrors carry the record's number."""
    render = "chat" if tokenizer.chat_template else "plain"
    first: FirstSeen = {}
    for number, record in enumerate(records):
        if isinstance(record, Mapping):
            where = f"record {number}"
            with _with_number(number):
                record_format = format or detect_format(record, where)
                if record_format == "tokenized":
                    check_same_masks(record, where, first=first)
                yield to_example(record, format=record_format, where=where, render=render)
        else:
            yield record


@contextmanager
def rare_collection() -> Iterator[None]:
    """Collects garbage less often: walking over all examples again and again costs 10-20 % of the time."""
    before = gc.get_threshold()
    gc.set_threshold(GC_THRESHOLD, *before[1:])
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
    faults: ErrorsByNumber = None,
) -> TokenizedRows:
    """Labels, encodes and fits all examples.

    Args:
        faults: receives the error of each unusable example by its number; None raises the first error.

    Raises DataError, with the example's number in ``row``, if an example cannot be read or encoded.
    """
    renderer = Renderer(tokenizer, options)
    builder = _RowBuilder()
    numbered = enumerate(examples)
    while batch := list(islice(numbered, BATCH_EXAMPLES)):
        plans = _plan(batch, renderer, builder.control_texts, faults)
        rows_of = _encode(plans, renderer.encoder, faults)
        for number, example in batch:
            rows, fate, notes = [], Fate(UNREADABLE), []
            with _with_number(number, faults):
                if isinstance(example, Tokens):
                    rows, fate = _fit_weighed(example, tokens_to_rows(example, tokenizer), renderer)
                elif number in rows_of:  # otherwise it already has an error
                    check_encodable(example, rows_of[number], tokenizer)
                    rows, fate = _fit_weighed(example, rows_of[number], renderer)
                    notes = plans[number].notes
            builder.add(number, rows, fate, notes)
    return builder.to_rows()


def check_encodable(example: AnyExample, rows: Rows, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises DataError for a character for which the tokenizer has no token."""
    unknown = unknown_id(tokenizer)
    if unknown is None or not any(unknown in row["input_ids"] for row in rows):
        return
    if (text := find_unknown(whole_text(example), tokenizer)) is not None:
        raise unspelled(text)


def unspelled(text: str, *, where: str = "") -> DataError:
    """Returns the error for a ``text`` for which the tokenizer has no token."""
    codes = " ".join(f"U+{ord(letter):04X}" for letter in text[:LISTED_LETTERS])
    fix = "remove it, or train the tokenizer on text that contains it"
    return DataError("the tokenizer has no token for it", where=where, got=f"{text!r} ({codes})", fix=fix)


class _RowBuilder:
    """Collects rows and concatenates them at the end."""

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
        """Returns flat arrays of all rows; without weights if all are 1."""
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
    batch: Sequence[tuple[int, AnyExample]],
    renderer: Renderer,
    control_texts: Counter[str],
    faults: ErrorsByNumber,
) -> dict[int, RowPlan]:
    """Returns the plan of each example that is text, by number.

    Counts the control tokens in the texts in ``control_texts``.
    """
    texts = {number: whole_text(example) for number, example in batch if not isinstance(example, Tokens)}
    suspects: set[int] = set()
    if renderer.encoder.may_have_control(texts.values()):  # a single search is enough for most batches
        suspects = {number for number, text in texts.items() if renderer.encoder.may_have_control([text])}
        examples = [example for number, example in batch if number in suspects]
        for example in examples:
            control_texts.update(renderer.control_texts(example))
        if batch[0][0] == 0 or len(batch) == BATCH_EXAMPLES:  # a short last batch is not representative
            check_not_rendered(renderer, examples, total=len(batch))
    plans = {}
    for number, example in batch:
        if not isinstance(example, Tokens):
            with _with_number(number, faults):
                plans[number] = renderer.plan(example, may_have_control=number in suspects)
    return plans


def _encode(plans: Mapping[int, RowPlan], encoder: Encoder, faults: ErrorsByNumber) -> dict[int, Rows]:
    """Returns the rows of each plan. A DataError carries the number of the example."""
    try:
        return dict(zip(plans, encode_plans(list(plans.values()), encoder), strict=True))
    except DataError:
        rows = {}
        for number, plan in plans.items():
            with _with_number(number, faults):
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
def _with_number(number: int, faults: ErrorsByNumber = None) -> Iterator[None]:
    """Adds the example's number to a DataError, so that the caller can add its file and line."""
    try:
        yield
    except DataError as error:
        error.row = number
        if faults is None:
            raise
        faults[number] = error
