"""Answers that a model gives to examples of its evaluation sets while it trains, as figures of the log.

The first examples of each set that have a prompt are answered, greedily, each process a share of them, and
compared with their targets. Answers and targets are in ``answers.jsonl``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from hf_clm.data.label.render import LabelOptions
from hf_clm.data.prepared.store import HEAD
from hf_clm.data.read.formats import import_function
from hf_clm.data.split import Split
from hf_clm.errors import RecipeError
from hf_clm.evaluation.answers import Answers, Sample, load_metrics
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import generate
from hf_clm.recipe.sections import Evaluation
from hf_clm.run_folder import append_json, drop_after
from hf_clm.schema import Example

WHERE = "evaluation.metrics"
# (answers, targets), both texts -> a number, or several by name
Metric = Callable[[list[str], list[str]], Any]


@dataclass(frozen=True)
class Question:
    """What is asked, and the target of its answer."""

    prompt: Example
    target: str


@dataclass(frozen=True)
class Answering:
    """Measures the answers of a model.

    sets: the questions of each evaluation set, by its prefix in the log: ``eval``, ``eval_news``.
    """

    sets: Mapping[str, Sequence[Question]]
    metrics: Mapping[str, Metric | None]
    tokenizer: PreTrainedTokenizerFast
    rendering: LabelOptions
    max_new_tokens: int
    arguments: TrainingArguments

    def forget_after(self, step: int) -> None:
        """Drops the answers of steps that come again."""
        if self.arguments.process_index == 0:
            drop_after(self._path, step)

    def measure(self, model: PreTrainedModel, *, step: int) -> dict[str, float]:
        """``eval_exact_match`` and such, on all processes alike; each of them has to ask."""
        found: dict[str, float] = {}
        for prefix, questions in self.sets.items():
            samples = self._answer(model, questions)
            if self.arguments.process_index == 0:
                for sample in samples:
                    shown = {"prompt": sample.prompt, "target": sample.target, "text": sample.text}
                    append_json(self._path, {"step": step, "set": prefix, **shown, "exact": sample.is_exact})
            found |= {f"{prefix}_{name}": value for name, value in self._agree(samples).items()}
        return found

    def _agree(self, samples: Sequence[Sample]) -> dict[str, float]:
        """The figures of the first process, on all: a metric may draw, and each would choose another model.

        Raises what a metric raises, and RecipeError on the others: none waits for one that has ended.
        """
        given: list[Any] = [None]
        failure: Exception | None = None
        if self.arguments.process_index == 0:
            try:
                given = [self._compare(samples)]
            except Exception as error:
                given, failure = [str(error)], error
        (found,) = broadcast_object_list(given)
        if failure is not None:
            raise failure
        if isinstance(found, str):
            raise RecipeError(f"failed on the first process: {found}", where=WHERE)
        return found

    @property
    def _path(self) -> Path:
        return Path(str(self.arguments.output_dir)) / "answers.jsonl"

    def _answer(self, model: PreTrainedModel, questions: Sequence[Question]) -> list[Sample]:
        """Each of n processes answers every nth question; all of them get all the answers, in order."""
        first, step = self.arguments.process_index, self.arguments.world_size
        numbers = range(first, len(questions), step)
        prompts = [questions[number].prompt for number in numbers]
        decoding = Decoding(self.max_new_tokens)
        given = generate(model, self.tokenizer, prompts=prompts, decoding=decoding, rendering=self.rendering)
        own = [
            Sample(
                number, questions[number].prompt.prompt_text, questions[number].target, one.text, one.stopped
            )
            for number, one in zip(numbers, given, strict=True)
        ]
        return sorted(gather_object(own), key=lambda sample: sample.number)

    def _compare(self, samples: Sequence[Sample]) -> dict[str, float]:
        answers, targets = [sample.text for sample in samples], [sample.target for sample in samples]
        stock = Answers(samples, load_metrics() if self.metrics.keys() & STOCK else {}).to_json()
        found: dict[str, float] = {}
        for name, metric in self.metrics.items():
            value = stock[name] if metric is None else metric(answers, targets)
            named = value.items() if isinstance(value, Mapping) else [("", value)]
            for key, number in named:
                number = number.item() if hasattr(number, "item") else number  # of NumPy or torch
                if not isinstance(number, int | float):
                    got = f"{name} returned {type(number).__name__}"
                    raise RecipeError("a metric returns a number, or several by name", where=WHERE, got=got)
                found[f"{name}_{key}" if key else name] = float(number)
        return found


STOCK = {"chrf", "bleu"}  # of sacrebleu


def load_answer_metrics(section: Evaluation) -> dict[str, Metric | None]:
    """The metrics by name; None for those of ``hf-clm evaluate``. Imports functions of the user's own.

    Raises RecipeError for a function that is not there, EnvironmentFault where sacrebleu is missing.
    """
    if not section.generate:
        return {}
    found: dict[str, Metric | None] = {}
    for name in section.metrics:
        is_own = ":" in name
        metric = import_function(name, kind="metric", where=WHERE) if is_own else None
        found[name.rpartition(":")[2]] = metric
    if found.keys() & STOCK:
        load_metrics()
    return found


def find_questions(split: Split, count: int) -> list[Question]:
    """The first ``count`` examples of a set that have a prompt and a text as their target."""
    first = split.examples.examples[: max(count, HEAD)]
    asked = (example.question for example in first)
    return [Question(*question) for question in islice(filter(None, asked), count)]
