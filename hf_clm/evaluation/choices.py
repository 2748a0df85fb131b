"""Selects the most likely of several given answers, without generating.

prompt | yes <eos>     -0.3      each choice is rendered and tokenized like a completion in training;
prompt | no  <eos>     -1.6      its score is the sum or the mean of its tokens' log-probabilities
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
    """The correct choice of each example, and the scores of all choices.

    N = examples, C = choices.

        expected   (N,) int64, the index of the correct choice
        scores     (N, C) float64, the log-probability of each choice
    """

    choices: Sequence[str]
    expected: np.ndarray
    scores: np.ndarray

    def select(self, numbers: np.ndarray) -> "Verdicts":
        """Returns the verdicts of some examples; ``numbers`` are their indices, or a mask (N,) bool."""
        return Verdicts(self.choices, self.expected[numbers], self.scores[numbers])

    @property
    def confusion(self) -> np.ndarray:
        """Confusion matrix (C, C) int64: rows are the correct choices, columns the model's."""
        table = np.zeros((len(self.choices), len(self.choices)), dtype=np.int64)
        np.add.at(table, (self.expected, self.scores.argmax(axis=1)), 1)
        return table

    def to_json(self) -> dict[str, Any]:
        """Returns accuracy, F1 and the confusion matrix.

        With two choices, ``f1`` is that of the first, the positive class; with more, it is the macro average.
        ``majority`` is the accuracy of always selecting the most common choice.
        """
        table, count = self.confusion, max(1, len(self.expected))
        f1 = [_f1(table, number) for number in range(len(self.choices))]
        rows = [dict(zip(self.choices, row, strict=True)) for row in table.tolist()]
        return {
            "accuracy": int(table.trace()) / count,
            "majority": int(table.sum(axis=1).max()) / count,
            "f1": f1[0] if len(f1) == 2 else sum(f1) / len(f1),
            "f1_of": self.choices[0] if len(f1) == 2 else "macro",
            "confusion": dict(zip(self.choices, rows, strict=True)),
        }


def to_choices(text: str) -> list[str]:
    """Splits choices at commas. Raises RecipeError for fewer than two, an empty one, or a duplicate."""
    choices = text.split(",")
    if len(choices) < 2 or not all(map(str.strip, choices)) or len(set(choices)) < len(choices):
        what, fix = "expected two or more different choices", "separate them with commas: --choices yes,no"
        raise RecipeError(what, where="--choices", got=repr(text), fix=fix)
    return choices


def find_expected(read: Examples, choices: Sequence[str]) -> np.ndarray:
    """Returns the index of each example's correct choice, (N,) int64.

    Raises DataError for an example without a prompt and an answer, or with an answer that is not a choice.
    """
    expected = []
    for example, place in zip(read.examples, read.places, strict=True):
        answer = None if isinstance(example, Tokens) else to_answer(example)
        if answer is None:
            what = "the example has no prompt and completion, so there is nothing to choose"
            raise DataError(what, where=place, fix="remove --choices")
        if answer not in choices:
            what = f"the completion is not one of the choices {', '.join(map(repr, choices))}"
            fix = f"add it to --choices{did_you_mean(answer, choices)}"
            raise DataError(what, where=place, got=repr(answer), fix=fix)
        expected.append(choices.index(answer))
    return np.array(expected, dtype=np.int64)


def to_answer(example: Example) -> str | None:
    """Returns the text that a choice replaces: the completion or, with a template, its column; None without a
    prompt.

    Raises RecipeError if the completion of a template has text between several columns.
    """
    question = example.question
    if question is None:
        return None
    if isinstance(example, Chat):
        return question[1]
    learned = _learned(example)
    words = _words(learned)
    if any(learned[number].is_own for number in range(words.start, words.stop)):
        what = "a choice cannot replace several columns of a completion"
        raise RecipeError(what, where="--choices", fix="use a template with one column in its completion")
    return "".join(segment.text for segment in learned[words])


def with_answer(example: Example, answer: str) -> Example:
    """Returns the example with another completion, keeping a template's text around it."""
    if isinstance(example, Chat):
        turn: Message = {"role": "assistant", "content": answer}
        return replace(example, messages=[*example.messages[:-1], turn])
    learned = _learned(example)
    prompt, words = example.segments[: len(example.segments) - len(learned)], _words(learned)
    word = Segment(answer, weight=1.0)
    return Document([*prompt, *learned[: words.start], word, *learned[words.stop :]])


def measure_choices(
    model: PreTrainedModel, rows: Sequence[TokenizedExample], *, choices: int, by: str, batch_size: int
) -> np.ndarray:
    """Returns the log-probability of each choice, (N, ``choices``) float64.

    Args:
        rows: from ``choice_rows``.
        choices: the number of choices.
        by: ``sum`` or ``mean`` over the tokens of a choice.
        batch_size: rows in a batch; does not change the result.

    Raises ModelError if a log-probability is NaN.
    """
    scores = []
    for start in trange(0, len(rows), batch_size, desc="choices", disable=None, leave=False):
        batch = rows[start : start + batch_size]
        for row, (nll, _) in zip(batch, measure_rows(model, batch), strict=True):
            losses = nll[_last_target(row) :].astype(np.float64)
            scores.append(-losses.mean() if by == "mean" else -losses.sum())
    if np.isnan(scores).any():
        raise ModelError("the model's log-probabilities are NaN", where="--choices")
    return np.array(scores).reshape(-1, choices)


def choice_rows(
    read: Examples,
    tokenizer: PreTrainedTokenizerFast,
    *,
    choices: Sequence[str],
    max_length: int,
    special_tokens_in_text: Policy,
) -> list[TokenizedExample]:
    """Tokenizes every example with every choice as in training; returns the rows example by example.

    A prompt that is too long is truncated on the left, by the same number of tokens for all choices. Raises
    DataError if a choice leaves no room for the prompt.
    """
    examples = [example for example in read.examples if not isinstance(example, Tokens)]
    candidates = [with_answer(example, choice) for example in examples for choice in choices]
    dataset = SFTDataset(
        candidates, tokenizer, train_on="last_turn", special_tokens_in_text=special_tokens_in_text
    )
    assert len(dataset) == len(candidates), "a prompt and a choice always have a target"
    rows = []
    for number, place in enumerate(read.places):
        group = [dataset[number * len(choices) + choice] for choice in range(len(choices))]
        cut = max(0, max(len(row["input_ids"]) for row in group) - max_length)
        if cut and cut >= min(
            int(target_places(np.array(row["labels"]))[_last_target(row)]) for row in group
        ):
            what = f"the choices leave no room for the prompt within {max_length} tokens"
            raise DataError(what, where=place, fix="raise --max_length, or use shorter choices")
        rows += [slice_row(row, start=cut, stop=len(row["input_ids"])) if cut else row for row in group]
    return rows


def _learned(example: Document) -> list[Segment]:
    """Returns the segments after the last one that is not a target."""
    ends = [number for number, segment in enumerate(example.segments, start=1) if not segment.is_target]
    return example.segments[ends[-1] if ends else 0 :]


def _words(learned: Sequence[Segment]) -> slice:
    """Returns the range from the first to the last segment that comes from the record, not the template."""
    numbers = [number for number, segment in enumerate(learned) if not segment.is_own]
    return slice(numbers[0], numbers[-1] + 1)


def _last_target(row: TokenizedExample) -> int:
    """Returns where the last target of a row begins, as an index into its target tokens."""
    return int(np.flatnonzero(target_starts(np.array(row["labels"])))[-1])


def _f1(table: np.ndarray, choice: int) -> float:
    """Returns 2 TP / (2 TP + FP + FN); 0 for a choice that is never correct nor selected."""
    both = int(table[choice].sum() + table[:, choice].sum())
    return 2 * int(table[choice, choice]) / both if both else 0.0
