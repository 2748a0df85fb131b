"""``hf-clm evaluate``: computes metrics of a model on data files, over all examples and per file."""

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hf_clm.data.label.datasets import TokenizedDataset, label_options, tokenize_rows
from hf_clm.data.label.render import Policy
from hf_clm.data.prepared.sets import load_examples
from hf_clm.data.read.faults import check_sources
from hf_clm.data.read.plain_template import is_plain
from hf_clm.data.read.records import Examples
from hf_clm.errors import DataError
from hf_clm.evaluation.answers import Answers, load_metrics, measure_answers
from hf_clm.evaluation.before import Before, load_before
from hf_clm.evaluation.choices import Verdicts, choice_rows, find_expected, measure_choices, to_choices
from hf_clm.evaluation.likelihood import Likelihood, measure_likelihood
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.load import LoadedRun, load_run, run_recipe
from hf_clm.gguf import settings_folder
from hf_clm.hub import load_options
from hf_clm.recipe.recipe import Data, Recipe, Source
from hf_clm.schema import Overflow
from hf_clm.text.tokenizer import load_tokenizer

Stage = Literal["sft", "pretrain"]
DEFAULT_OVERFLOW: dict[str, Overflow] = {"sft": "keep_target", "pretrain": "split"}
# The columns of the table of files.
FILE_METRICS = (
    "examples",
    "loss",
    "bits_per_byte",
    "token_accuracy",
    "accuracy",
    "f1",
    "exact_match",
    "chrf",
)

COMPARED = ("loss", "perplexity", "bits_per_byte", "token_accuracy")  # before and after

Table = tuple[list[str], list[list[str]]]  # header, rows; the first column has names


LINE = re.compile(r":[0-9]+$|: record [0-9]+$")  # follows the file in the place of an example


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    verdicts: only with choices
    answers: only if generated
    before: another model that was measured too, and its likelihood of the same rows
    """

    run: LoadedRun
    read: Examples
    dataset: TokenizedDataset
    likelihood: Likelihood
    verdicts: Verdicts | None
    answers: Answers | None
    before: tuple[Before, Likelihood] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns all metrics, also per file if there are several, and the samples with ``--generate``."""
        metrics = self.measure(np.ones(len(self.read), dtype=bool))
        if self.read.report.bad_lines:  # only with data.on_bad_record: drop
            metrics["skipped"] = len(self.read.report.bad_lines)
        files = np.array([LINE.sub("", place) for place in self.read.places])
        names = list(dict.fromkeys(files.tolist()))
        if len(names) > 1:
            metrics["sources"] = {name: self.measure(files == name) for name in names}
        if self.before:
            before, likelihood = self.before
            metrics["before"] = {"model": before.name, **likelihood.to_json()}
        if self.answers and self.answers.metrics:
            metrics["samples"] = [sample.to_json(self.read.places) for sample in self.answers.samples]
        return metrics

    def measure(self, mask: np.ndarray) -> dict[str, Any]:
        """Returns the metrics of some of the examples; ``mask`` (examples,) bool."""
        rows = self.dataset.rows
        fates = zip(rows.fates, mask, strict=True)
        return {
            "examples": int(mask.sum()),
            "dropped": sum(fate.kind == "dropped" for fate, is_selected in fates if is_selected),
            **self.likelihood.select(mask[rows.sources]).to_json(),
            **(self.verdicts.select(mask).to_json() if self.verdicts else {}),
            **(self.answers.select(mask).to_json() if self.answers else {}),
        }


def evaluate_run(options: Namespace) -> Evaluation:
    """Evaluates the likelihood of the targets, and either choices or (if there are prompts) greedy answers.

    The data are read and labelled as in the run's recipe, so evaluating the run's eval set reproduces its
    eval loss. Raises DataError if no example has a target, or an answer is not one of the choices.
    """
    metrics = load_metrics() if options.generate else {}
    choices = to_choices(options.choices) if options.choices is not None else []
    folder = settings_folder(options.run, where="run or model")
    load_options(folder, revision=None, where="run or model")  # fails early if it is missing
    recipe = run_recipe(folder)
    data = to_data(options, recipe)
    check_sources(data.model_copy(update={"eval": []}))
    read = load_examples(data)
    expected = find_expected(read, choices) if choices else None
    run = load_run(options.run, device=options.device, dtype=options.dtype)
    before = load_before(options.before, run, options) if options.before else None
    stage: Stage = options.stage or run.stage
    max_length = options.max_length or run.max_length
    dataset = build_dataset(read, run, stage=stage, recipe=recipe, max_length=max_length)
    size = options.batch_size
    likelihood = measure_likelihood(run.model, run.tokenizer, dataset=dataset, batch_size=size)
    earlier = None
    if before:
        with before.active():
            earlier = measure_likelihood(before.model, run.tokenizer, dataset=dataset, batch_size=size)
    verdicts = answers = None
    if expected is not None:
        policy: Policy = data.special_tokens_in_text
        rows = choice_rows(
            read, run.tokenizer, choices=choices, max_length=max_length, special_tokens_in_text=policy
        )
        count, by = len(choices), options.choices_by
        scores = measure_choices(run.model, rows, choices=count, by=by, batch_size=size)
        verdicts = Verdicts(choices, expected, scores)
    if options.generate or (stage == "sft" and not choices and not options.no_generate):
        answers = measure_answers(
            run.model,
            run.tokenizer,
            examples=read.examples,
            metrics=metrics,
            decoding=Decoding(max_new_tokens=options.max_new_tokens),
            rendering=run.rendering,
        )
    if options.generate and not answers:
        where = ", ".join(read.report.files[:2])
        raise DataError("no example has a prompt to answer", where=where, fix="remove --generate")
    return Evaluation(
        run, read, dataset, likelihood, verdicts, answers, before and earlier and (before, earlier)
    )


def to_data(options: Namespace, recipe: Recipe | None) -> Data:
    """Returns the data section for ``options.data``: that of the run, with other sources.

    Format and columns are those of the run if all its sources agree and ``--format`` is not given.
    """
    if recipe is None:
        tokenizer = load_tokenizer(settings_folder(options.run, where="run or model"))
        has_chat_template = bool(tokenizer.chat_template) and not is_plain(tokenizer)
        sources = [Source(path=path, format=options.format) for path in options.data]
        return Data(train=sources, render="chat" if has_chat_template else "plain")
    first, *others = [(source.format, source.fields, source.template) for source in recipe.data.train]
    is_shared = all(other == first for other in others) and not options.format
    format, fields, template = first if is_shared else (options.format, {}, None)
    sources = [Source(path=path, format=format, fields=fields, template=template) for path in options.data]
    return recipe.data.model_copy(update={"train": sources, "duplicates": "keep"})


def build_dataset(
    read: Examples, run: LoadedRun, *, stage: Stage, recipe: Recipe | None, max_length: int
) -> TokenizedDataset:
    """Labels the examples as in the run. Raises DataError if no example has a target that fits."""
    options = run.rendering
    if recipe and recipe.stage == stage:
        options = label_options(recipe)
    overflow = options.overflow if recipe and recipe.stage == stage == "sft" else DEFAULT_OVERFLOW[stage]
    options = replace(options, stage=stage, max_length=max_length, overflow=overflow, window=None)
    try:
        rows = tokenize_rows(read.examples, run.tokenizer, options)
    except DataError as error:
        raise error if error.row is None else error.at(read.places[error.row]) from error
    if len(rows) == 0:
        where = ", ".join(read.report.files[:2])
        raise DataError("no example has a target that fits into a row", where=where, fix="raise --max_length")
    return TokenizedDataset(rows)


def to_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Formats each metric as a line, followed by the tables."""
    lines = [f"{name:<16} {value}" for name, value in to_figures(metrics).items()]
    for table in to_tables(metrics).values():
        lines += ["", *_aligned(*table)]
    return lines


def to_figures(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Formats the metrics that are single values."""
    return {name: _to_text(value) for name, value in metrics.items() if not isinstance(value, dict | list)}


def to_tables(metrics: Mapping[str, Any]) -> dict[str, Table]:
    """Formats the metrics before and after, the confusion matrix and the files as tables, by title."""
    tables = {}
    if before := metrics.get("before"):
        rows = [[key, _to_text(before[key]), _to_text(metrics[key])] for key in COMPARED]
        tables["before and after"] = (["", "before", "after"], rows)
    if confusion := metrics.get("confusion"):
        rows = [[f"is {label}", *map(_to_text, counts.values())] for label, counts in confusion.items()]
        tables["choices"] = (["", *(f"chose {choice}" for choice in confusion)], rows)
    if sources := metrics.get("sources"):
        names = [name for name in FILE_METRICS if name in metrics]
        rows = [
            [file, *(_to_text(values.get(name, "")) for name in names)] for file, values in sources.items()
        ]
        tables["files"] = (["file", *names], rows)
    return tables


def _to_text(value: float | str) -> str:
    """Formats a value: integers with separators, floats with four decimals, text unchanged."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats a table in columns: the first is aligned left, the others right."""
    first, *others = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    form = f"{{:<{first}}}" + "".join(f"  {{:>{width}}}" for width in others)
    return [form.format(*row).rstrip() for row in (head, *rows)]
