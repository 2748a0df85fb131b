"""``hf-clm evaluate``: a run and data files become figures, of all examples and of each file."""

import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_clm.config import Data, Recipe, Source, load_recipe
from hf_clm.data.build import Examples, check_spelled, load_examples
from hf_clm.data.datasets import PretrainDataset, SFTDataset
from hf_clm.errors import DataError
from hf_clm.evaluation.answers import Answers, load_metrics, measure_answers
from hf_clm.evaluation.choices import Verdicts, choice_rows, find_expected, measure_choices, to_choices
from hf_clm.evaluation.evaluate import Likelihood, measure_likelihood
from hf_clm.generation.load import LoadedRun, load_run
from hf_clm.hub import load_options

LINE = re.compile(r":[0-9]+$|: record [0-9]+$")  # of a place, behind its file


@dataclass(frozen=True)
class Evaluation:
    """What a run was found to know of its examples. ``verdicts``: with choices; ``answers``: generated."""

    run: LoadedRun
    read: Examples
    dataset: SFTDataset | PretrainDataset
    likelihood: Likelihood
    verdicts: Verdicts | None
    answers: Answers | None

    def to_json(self) -> dict[str, Any]:
        """All figures, then those of each file where there are several, and what was generated if asked."""
        found = self.figures(np.ones(len(self.read), dtype=bool))
        if self.read.report.bad_lines:  # data.skip_bad_lines of the run
            found["skipped"] = len(self.read.report.bad_lines)
        files = np.array([LINE.sub("", place) for place in self.read.places])
        names = list(dict.fromkeys(files.tolist()))
        if len(names) > 1:
            found["sources"] = {name: self.figures(files == name) for name in names}
        if self.answers and self.answers.metrics:
            found["samples"] = [
                {"where": self.read.places[sample.number], "prompt": sample.prompt, "target": sample.target}
                | {"generated": sample.text, "exact": sample.is_exact, "stopped": sample.stopped}
                for sample in self.answers.samples
            ]
        return found

    def figures(self, chosen: np.ndarray) -> dict[str, Any]:
        """The figures of some of the examples; ``chosen`` (examples,) bool."""
        rows = self.dataset.rows
        fates = zip(rows.fates, chosen, strict=True)
        return {
            "examples": int(chosen.sum()),
            "dropped": sum(fate.kind == "dropped" for fate, is_chosen in fates if is_chosen),
            **self.likelihood.select(chosen[rows.sources]).to_json(),
            **(self.verdicts.select(chosen).to_json() if self.verdicts else {}),
            **(self.answers.select(chosen).to_json() if self.answers else {}),
        }


def evaluate_run(options: Namespace) -> Evaluation:
    """Likelihood of the targets, and the choices or, where the examples have prompts, greedy answers.

    The data are read and labelled as in the run's recipe: its eval set gives the eval loss of its training.
    Raises DataError where no example has a target, or one has none of the choices.
    """
    metrics = load_metrics() if options.generate else {}
    choices = to_choices(options.choices) if options.choices is not None else []
    load_options(options.run, revision=None, where="run or model")  # what is not there is said at once
    recipe = read_recipe(options.run)
    data = to_data(options, recipe)
    read = load_examples(data.train, data)
    expected = find_expected(read, choices) if choices else None
    run = load_run(options.run, device=options.device)
    stage = options.stage or run.stage
    settings: dict[str, Any] = {"special_tokens_in_text": data.special_tokens_in_text}
    settings["max_length"] = options.max_length or run.max_length
    dataset = build_dataset(read, run, stage=stage, recipe=recipe, **settings)
    sizes = {"dataset": dataset, "batch_size": options.batch_size}
    likelihood = measure_likelihood(run.model, run.tokenizer, **sizes)
    verdicts = answers = None
    if expected is not None:
        rows = choice_rows(read, run.tokenizer, choices=choices, **settings)
        ways = {"by": options.choices_by, "batch_size": options.batch_size}
        scores = measure_choices(run.model, rows, choices=len(choices), **ways)
        verdicts = Verdicts(choices, expected, scores)
    if options.generate or (stage == "sft" and not choices and not options.no_generate):
        limits = {"max_new_tokens": options.max_new_tokens, "do_sample": False, "metrics": metrics}
        limits["special_tokens_in_text"] = data.special_tokens_in_text
        answers = measure_answers(run.model, run.tokenizer, examples=read.examples, **limits)
    if options.generate and not answers:
        where = ", ".join(read.report.files[:2])
        raise DataError("no example has a prompt to answer", where=where, fix="leave out --generate")
    return Evaluation(run, read, dataset, likelihood, verdicts, answers)


def read_recipe(run: str) -> Recipe | None:
    """The recipe of a run's folder; None for another model."""
    path = Path(run).expanduser() / "recipe.yaml"
    return load_recipe(path) if path.is_file() else None


def to_data(options: Namespace, recipe: Recipe | None) -> Data:
    """The data section to read ``options.data`` with: the run's, but for its sources.

    Format and columns are those that all sources of the run share, unless ``--format`` names another.
    """
    if recipe is None:
        return Data(train=[Source(path=path, format=options.format) for path in options.data])
    keys = ("format", "fields", "template")
    first, *others = ({key: getattr(source, key) for key in keys} for source in recipe.data.train)
    is_shared = all(other == first for other in others) and not options.format
    shape = first if is_shared else {"format": options.format}
    sources = [Source(path=path, **shape) for path in options.data]
    return recipe.data.model_copy(update={"train": sources, "duplicates": "keep"})


def build_dataset(
    read: Examples, run: LoadedRun, *, stage: str, recipe: Recipe | None, **settings: Any
) -> SFTDataset | PretrainDataset:
    """The examples labelled as the run labels them. Raises DataError where none has a target that fits.

    Args:
        settings: of the dataset: ``max_length``, ``special_tokens_in_text``.
    """
    try:
        if stage == "pretrain":
            dataset = PretrainDataset(read.examples, run.tokenizer, **settings)
        else:
            settings["overflow"] = (
                recipe.resolved_overflow if recipe and recipe.stage == "sft" else "keep_target"
            )
            settings["train_on"] = recipe.data.train_on if recipe else "all_turns"
            dataset = SFTDataset(read.examples, run.tokenizer, **settings)
    except DataError as error:
        raise error if error.row is None else error.at(read.places[error.row]) from error
    check_spelled(read, dataset.rows, tokenizer=run.tokenizer)
    if len(dataset) == 0:
        where = ", ".join(read.report.files[:2])
        raise DataError("no example has a target that fits", where=where, fix="raise --max_length")
    return dataset
