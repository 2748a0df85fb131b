"""Chooses among given answers the one that the model finds likeliest after the prompt; generates nothing.

prompt | yes <eos>     -0.3      a choice is written, tokenized and ended as training does a completion;
prompt | no  <eos>     -1.6      the log-probabilities of its tokens are summed, or their mean is taken
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import trange
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.label.datasets import SFTDataset
from hf_clm.data.label.labels import slice_row
from hf_clm.data.label.render import Policy
from hf_clm.data.read.records import Examples
from hf_clm.errors import DataError, ModelError, RecipeError, did_you_mean
from hf_clm.evaluation.likelihood import measure_rows, target_places, target_starts
from hf_clm.schema import Chat, Document, Example, Message, Segment, TokenizedExample, Tokens


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What was right and what was chosen.

    N = examples, C = choices.

        expected   (N,) int64, the number of the right choice
        scores     (N, C) float64, log-probability of each
    """

    choices: Sequence[str]
    expected: np.ndarray
    scores: np.ndarray

    def select(self, numbers: np.ndarray) -> "Verdicts":
        """Of these examples alone; ``numbers``, or (N,) bool."""
        return Verdicts(self.choices, self.expected[numbers], self.scores[numbers])

    @property
    def confusion(self) -> np.ndarray:
        """(C, C) int64: how often the choice of the row was right and that of the column was chosen."""
        table = np.zeros((len(self.choices), len(self.choices)), dtype=np.int64)
        np.add.at(table, (self.expected, self.scores.argmax(axis=1)), 1)
        return table

    def to_json(self) -> dict[str, Any]:
        """Accuracy, F1, and how often each right choice was met by each.

        ``f1`` of two choices is that of the first, the positive; of more it is the mean over all.
        ``majority`` is the accuracy of always choosing the most common one.
        """
        table, count = self.confusion, max(1, len(self.expected))
        f1 = [_f1(table, number) for number in range(len(self.choices))]
        named = [dict(zip(self.choices, row, strict=True)) for row in table.tolist()]
        return {
            "accuracy": int(table.trace()) / count,
            "majority": int(table.sum(axis=1).max()) / count,
            "f1": f1[0] if len(f1) == 2 else sum(f1) / len(f1),
            "f1_of": self.choices[0] if len(f1) == 2 else "macro",
            "confusion": dict(zip(self.choices, named, strict=True)),
        }


def to_choices(text: str) -> list[str]:
    """The choices between commas. Raises RecipeError for fewer than two, an empty one, or one given twice."""
    choices = text.split(",")
    if len(choices) < 2 or not all(map(str.strip, choices)) or len(set(choices)) < len(choices):
        what, fix = "expected two or more different choices", "--choices yes,no"
        raise RecipeError(what, where="--choices", got=repr(text), fix=fix)
    return choices


def find_expected(read: Examples, choices: Sequence[str]) -> np.ndarray:
    """(N,) int64: the number of the choice that each example answers with.

    Raises DataError for an example that has no prompt and answer, or another answer.
    """
    expected = []
    for example, place in zip(read.examples, read.places, strict=True):
        answer = None if isinstance(example, Tokens) else to_answer(example)
        if answer is None:
            raise DataError("has no prompt and completion to choose", where=place, fix="leave out --choices")
        if answer not in choices:
            fix = f"--choices names {', '.join(map(repr, choices))}{did_you_mean(answer, choices)}"
            raise DataError("the completion is none of the choices", where=place, got=repr(answer), fix=fix)
        expected.append(choices.index(answer))
    return np.array(expected, dtype=np.int64)


def to_answer(example: Example) -> str | None:
    """What a choice stands for: the completion, or the word in that of a template; None without a prompt.

    Raises RecipeError where the template writes between several columns.
    """
    question = example.question
    if question is None:
        return None
    if isinstance(example, Chat):
        return question[1]
    learned = _learned(example)
    words = _words(learned)
    if any(learned[number].is_own for number in range(words.start, words.stop)):
        what = "a choice cannot stand for several columns of a completion"
        raise RecipeError(what, where="--choices", fix="a template with one column in its completion")
    return "".join(segment.text for segment in learned[words])


def with_answer(example: Example, answer: str) -> Example:
    """The example with another completion; what a template writes around its word stays."""
    if isinstance(example, Chat):
        turn: Message = {"role": "assistant", "content": answer}
        return replace(example, messages=[*example.messages[:-1], turn])
    learned = _learned(example)
    read, words = example.segments[: len(example.segments) - len(learned)], _words(learned)
    word = Segment(answer, weight=1.0)
    return Document([*read, *learned[: words.start], word, *learned[words.stop :]])


def measure_choices(
    model: PreTrainedModel, rows: Sequence[TokenizedExample], *, choices: int, by: str, batch_size: int
) -> np.ndarray:
    """(N, ``choices``) float64: the log-probability of each choice, the sum over its tokens or the ``mean``.

    rows: of ``choice_rows``. Rows of several examples share a pass; ``batch_size`` (rows) changes nothing.
    Raises ModelError where one is NaN.
    """
    scores = []
    for start in trange(0, len(rows), batch_size, desc="choices", disable=None, leave=False):
        batch = rows[start : start + batch_size]
        for row, (nll, _) in zip(batch, measure_rows(model, batch), strict=True):
            own = nll[_last_target(row) :].astype(np.float64)
            scores.append(-own.mean() if by == "mean" else -own.sum())
    if np.isnan(scores).any():
        raise ModelError("its log-probabilities are NaN: it prefers none of the choices", where="--choices")
    return np.array(scores).reshape(-1, choices)


def choice_rows(
    read: Examples,
    tokenizer: PreTrainedTokenizerFast,
    *,
    choices: Sequence[str],
    max_length: int,
    special_tokens_in_text: Policy,
) -> list[TokenizedExample]:
    """Every example with every choice, tokenized as in training; example by example.

    A prompt that is too long is cut from the left, at one place for all choices. Raises DataError where a
    choice leaves no room for it.
    """
    written = [example for example in read.examples if not isinstance(example, Tokens)]
    candidates = [with_answer(example, choice) for example in written for choice in choices]
    dataset = SFTDataset(
        candidates, tokenizer, train_on="last_turn", special_tokens_in_text=special_tokens_in_text
    )
    assert len(dataset) == len(candidates), "a prompt and a choice always have a target"
    rows = []
    for number, place in enumerate(read.places):
        own = [dataset[number * len(choices) + choice] for choice in range(len(choices))]
        cut = max(0, max(len(row["input_ids"]) for row in own) - max_length)
        if cut and cut >= min(int(target_places(np.array(row["labels"]))[_last_target(row)]) for row in own):
            what = f"no prompt fits beside the choices within {max_length} tokens"
            raise DataError(what, where=place, fix="raise --max_length, or give shorter choices")
        rows += [slice_row(row, start=cut, stop=len(row["input_ids"])) if cut else row for row in own]
    return rows


def _learned(example: Document) -> list[Segment]:
    """The segments after the last one that is only read."""
    ends = [number for number, segment in enumerate(example.segments, start=1) if not segment.is_target]
    return example.segments[ends[-1] if ends else 0 :]


def _words(learned: Sequence[Segment]) -> slice:
    """From the first segment that is the record's to the last."""
    numbers = [number for number, segment in enumerate(learned) if not segment.is_own]
    return slice(numbers[0], numbers[-1] + 1)


def _last_target(row: TokenizedExample) -> int:
    """The number of the target token with which the last target of a row begins."""
    return int(np.flatnonzero(target_starts(np.array(row["labels"])))[-1])


def _f1(table: np.ndarray, choice: int) -> float:
    """2 TP / (2 TP + FP + FN), 0 for a choice that is neither right nor chosen anywhere."""
    both = int(table[choice].sum() + table[:, choice].sum())
    return 2 * int(table[choice, choice]) / both if both else 0.0
