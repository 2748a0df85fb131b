"""Map-style datasets of TokenizedExample: every row tokenized, fitted to ``max_length`` and accounted for."""

import gc
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from hf_clm.data.labels import Fate, count_targets, fit, mask_first, slice_example, tokenize_batch
from hf_clm.data.segments import control_texts, may_spell_control, to_document, to_segments, whole_text
from hf_clm.errors import DataError
from hf_clm.schema import Example, TokenizedExample

COLLECTED_EVERY = 50_000  # new objects; Python's own 700 suit a program that keeps few
BATCH_ROWS = 1000  # rows tokenized in one call: enough to keep the tokenizer's threads busy, little memory


@dataclass
class TokenizedRows:
    """Token ids and labels of many rows in two flat arrays, and what became of every input row.

    N = rows, S = tokens of all rows.

        input_ids, labels  (S,) int32
        offsets            (N + 1,) int64: row i is offsets[i]:offsets[i + 1]
        sources            (N,) int64: the input row that row i came from
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    sources: np.ndarray
    fates: Sequence[Fate] = field(default_factory=list)
    control_texts: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> TokenizedExample:
        number = range(len(self))[index]  # takes negative indices, raises IndexError past the end
        start, stop = self.offsets[number : number + 2]
        return {"input_ids": self.input_ids[start:stop].tolist(), "labels": self.labels[start:stop].tolist()}

    def piece(self, index: int, *, start: int, stop: int) -> TokenizedExample:
        """Tokens ``start`` to ``stop`` of a row as an example of its own; reads no more of the row."""
        part = slice(self.offsets[index] + start, self.offsets[index] + stop)
        return mask_first({"input_ids": self.input_ids[part].tolist(), "labels": self.labels[part].tolist()})

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens of each row."""
        return np.diff(self.offsets)


class TokenizedDataset(torch.utils.data.Dataset):
    """Rows that are tokenized already: ``dataset[i]`` is a TokenizedExample."""

    def __init__(self, rows: TokenizedRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.rows[index]


class SFTDataset(TokenizedDataset):
    """Rows of which only the targets are learned: completions, assistant turns, segments marked ``train``.

    Args:
        examples: any kind of Example, or TokenizedExample.
        max_length: tokens; None keeps every row whole.
        overflow: for a longer row: ``keep_target``, ``truncate``, ``drop``, ``error`` or ``split`` (see fit).

    ``dataset[i]`` is a TokenizedExample; ``dataset.rows.fates`` says what became of each example.
    """

    def __init__(
        self,
        examples: Iterable[Example | TokenizedExample],
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int | None = None,
        overflow: str = "keep_target",
        train_on: str = "all_turns",
        special_tokens_in_text: str = "encode_as_text",
    ):
        fitter = Fitter(max_length, overflow)
        options = {"train_on": train_on, "special_tokens_in_text": special_tokens_in_text}
        super().__init__(tokenize_rows(examples, tokenizer, fitter=fitter, **options))


class PretrainDataset(TokenizedDataset):
    """Documents that are learned whole, whatever kind of example they come as.

    Args:
        max_length: tokens; None keeps every document whole.
        overflow: as in SFTDataset; ``split`` makes several rows of a long document and loses no label.
        window: ``(size, step)`` in tokens cuts each document into overlapping windows instead.

    ``dataset[i]`` is a TokenizedExample.
    """

    def __init__(
        self,
        examples: Iterable[Example | TokenizedExample],
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int | None = None,
        overflow: str = "split",
        window: tuple[int, int] | None = None,
        special_tokens_in_text: str = "encode_as_text",
    ):
        fitter = Fitter(max_length, overflow) if window is None else WindowFitter(*window)
        documents = (_learn_all(example) for example in examples)
        options = {"train_on": "everything", "special_tokens_in_text": special_tokens_in_text}
        super().__init__(tokenize_rows(documents, tokenizer, fitter=fitter, **options))


@dataclass(frozen=True)
class Fitter:
    """Fits a row to ``max_length`` tokens by the rule ``overflow`` (``labels.fit``)."""

    max_length: int | None
    overflow: str

    def __call__(self, example: TokenizedExample) -> tuple[list[TokenizedExample], Fate]:
        return fit(example, self.max_length or len(example["input_ids"]), overflow=self.overflow)


@dataclass(frozen=True)
class WindowFitter:
    """Cuts a row into windows of ``size`` tokens, one every ``step`` tokens; the last may be shorter."""

    size: int
    step: int

    def __call__(self, example: TokenizedExample) -> tuple[list[TokenizedExample], Fate]:
        length = len(example["input_ids"])
        starts = range(0, max(1, length - (self.size - self.step)), self.step)
        windows = [slice_example(example, start=start, stop=start + self.size) for start in starts]
        windows = [window for window in windows if len(window["input_ids"]) > 1]
        size: dict[str, Any] = {"tokens": length, "target_tokens": count_targets(example)}
        if not windows:
            return [], Fate("dropped", "no target token", **size)
        return windows, Fate("split", "windows", **size) if len(windows) > 1 else Fate("used", **size)


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
    examples: Iterable[Example | TokenizedExample],
    tokenizer: PreTrainedTokenizerFast,
    *,
    fitter: Fitter | WindowFitter,
    train_on: str,
    special_tokens_in_text: str,
) -> TokenizedRows:
    """Tokenizes and fits all examples.

    Raises DataError, with the example's number in ``row``, where one cannot be read.
    """
    chunks: list[tuple[np.ndarray, np.ndarray]] = []
    lengths, sources, fates, found = [], [], [], Counter()
    numbered = enumerate(examples)
    options = {"train_on": train_on, "special_tokens_in_text": special_tokens_in_text}
    while batch := list(islice(numbered, BATCH_ROWS)):
        spelling = _find_spelling(batch, tokenizer)
        found.update(text for example in spelling.values() for text in control_texts(example, tokenizer))
        tokenized = _tokenize_mixed(batch, tokenizer, spelling=spelling, options=options)
        for (number, _), example in zip(batch, tokenized, strict=True):
            with _named(number):
                pieces, fate = fitter(example)
            fates.append(fate)
            lengths += [len(piece["input_ids"]) for piece in pieces]
            sources += [number] * len(pieces)
            chunks += [(_int32(piece["input_ids"]), _int32(piece["labels"])) for piece in pieces]
    ids = np.concatenate([chunk[0] for chunk in chunks]) if chunks else np.zeros(0, np.int32)
    labels = np.concatenate([chunk[1] for chunk in chunks]) if chunks else np.zeros(0, np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return TokenizedRows(ids, labels, offsets, np.array(sources, dtype=np.int64), fates, found)


def _tokenize_mixed(
    batch: Sequence[tuple[int, Example | TokenizedExample]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    spelling: Container[int],
    options: dict[str, str],
) -> list[TokenizedExample]:
    """Tokenizes what is text and takes as it is what is tokenized already, in the order of the batch.

    ``spelling``: the numbers of the examples in which control tokens must be looked for.
    """
    segments = {}
    unsearched = {**options, "special_tokens_in_text": "allow"}
    for number, example in batch:
        if not isinstance(example, dict):
            with _named(number):
                chosen = options if number in spelling else unsearched
                segments[number] = to_segments(example, tokenizer, **chosen)
    tokenized = dict(zip(segments, tokenize_batch(list(segments.values()), tokenizer), strict=True))
    return [
        mask_first(example) if isinstance(example, dict) else tokenized[number] for number, example in batch
    ]


def _find_spelling(
    batch: Sequence[tuple[int, Example | TokenizedExample]], tokenizer: PreTrainedTokenizerFast
) -> dict[int, Example]:
    """The examples of a batch that may spell a control token: one search where, as mostly, none does."""
    texts = {number: whole_text(example) for number, example in batch if not isinstance(example, dict)}
    if not may_spell_control(texts.values(), tokenizer):
        return {}
    return {
        number: example
        for number, example in batch
        if not isinstance(example, dict) and may_spell_control([texts[number]], tokenizer)
    }


def _learn_all(example: Example | TokenizedExample) -> Example | TokenizedExample:
    if isinstance(example, dict):
        return {"input_ids": example["input_ids"], "labels": example["input_ids"]}
    return to_document(example)


@contextmanager
def _named(number: int) -> Iterator[None]:
    """Puts the number of the example into a DataError, so that the caller can name its file and line."""
    try:
        yield
    except DataError as error:
        error.row = number
        raise


def _int32(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)
