"""Generates answers to examples of the evaluation sets during training, and logs how good they are.

The first examples of each set that have a prompt are divided among the processes, answered greedily and
compared with their targets. Answers and targets are written to ``answers.jsonl``.
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
# Takes the texts of the answers and of the targets; returns a number, or several numbers by name.
Metric = Callable[[list[str], list[str]], Any]


@dataclass(frozen=True)
class Question:
    """A prompt and the target that its answer is compared with."""

    prompt: Example
    target: str


@dataclass(frozen=True)
class Answering:
    """Measures the answers of a model.

    sets: the questions of each evaluation set, by the prefix of its metrics: ``eval``, ``eval_news``.
    """

    sets: Mapping[str, Sequence[Question]]
    metrics: Mapping[str, Metric | None]
    tokenizer: PreTrainedTokenizerFast
    rendering: LabelOptions
    max_new_tokens: int
    arguments: TrainingArguments

    def forget_after(self, step: int) -> None:
        """Drops the answers of steps after ``step``, which training will repeat."""
        if self.arguments.process_index == 0:
            drop_after(self._path, step)

    def measure(self, model: PreTrainedModel, *, step: int) -> dict[str, float]:
        """Returns ``eval_exact_match`` and so on, the same on all processes. Every process must call it."""
        metrics: dict[str, float] = {}
        for prefix, questions in self.sets.items():
            samples = self._answer(model, questions)
            if self.arguments.process_index == 0:
                for sample in samples:
                    texts = {"prompt": sample.prompt, "target": sample.target, "text": sample.text}
                    append_json(self._path, {"step": step, "set": prefix, **texts, "exact": sample.is_exact})
            metrics |= {f"{prefix}_{name}": value for name, value in self._agree(samples).items()}
        return metrics

    def _agree(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Returns the metrics of the first process on all processes.

        A metric may be random, and the processes must agree on the best checkpoint. If a metric raises, the
        first process raises that error and the others RecipeError, so that none waits for the first.
        """
        result: list[Any] = [None]
        failure: Exception | None = None
        if self.arguments.process_index == 0:
            try:
                result = [self._compare(samples)]
            except Exception as error:
                result, failure = [str(error)], error
        (metrics,) = broadcast_object_list(result)
        if failure is not None:
            raise failure
        if isinstance(metrics, str):
            raise RecipeError(f"failed on the first process: {metrics}", where=WHERE)
        return metrics

    @property
    def _path(self) -> Path:
        return Path(str(self.arguments.output_dir)) / "answers.jsonl"

    def _answer(self, model: PreTrainedModel, questions: Sequence[Question]) -> list[Sample]:
        """Answers the questions and returns all answers in order; each of n processes answers every nth."""
        first, step = self.arguments.process_index, self.arguments.world_size
        numbers = range(first, len(questions), step)
        prompts = [questions[number].prompt for number in numbers]
        decoding = Decoding(self.max_new_tokens)
        answers = generate(
            model, self.tokenizer, prompts=prompts, decoding=decoding, rendering=self.rendering
        )
        samples = [
            Sample(
                number, questions[number].prompt.prompt_text, questions[number].target, one.text, one.stopped
            )
            for number, one in zip(numbers, answers, strict=True)
        ]
        return sorted(gather_object(samples), key=lambda sample: sample.number)

    def _compare(self, samples: Sequence[Sample]) -> dict[str, float]:
        answers, targets = [sample.text for sample in samples], [sample.target for sample in samples]
        stock = Answers(samples, load_metrics() if self.metrics.keys() & SACREBLEU else {}).to_json()
        metrics: dict[str, float] = {}
        for name, metric in self.metrics.items():
            value = stock[name] if metric is None else metric(answers, targets)
            parts = value.items() if isinstance(value, Mapping) else [("", value)]
            for key, number in parts:
                number = number.item() if hasattr(number, "item") else number  # NumPy and torch scalars
                if not isinstance(number, int | float):
                    got = f"{name} returned {type(number).__name__}"
                    what = "a metric must return a number, or a dict of numbers"
                    raise RecipeError(what, where=WHERE, got=got)
                metrics[f"{name}_{key}" if key else name] = float(number)
        return metrics


SACREBLEU = {"chrf", "bleu"}


def load_answer_metrics(section: Evaluation) -> dict[str, Metric | None]:
    """Returns the metrics by name: the imported function, or None for a metric of ``hf-clm evaluate``.

    Raises RecipeError if a function does not exist, EnvironmentFault if sacrebleu is missing.
    """
    if not section.generate:
        return {}
    metrics: dict[str, Metric | None] = {}
    for name in section.metrics:
        is_function = ":" in name
        metric = import_function(name, kind="metric", where=WHERE) if is_function else None
        metrics[name.rpartition(":")[2]] = metric
    if metrics.keys() & SACREBLEU:
        load_metrics()
    return metrics


def find_questions(split: Split, count: int) -> list[Question]:
    """Returns the first ``count`` examples of a set that have a prompt and a target text."""
    first = split.examples.examples[: max(count, HEAD)]
    questions = (example.question for example in first)
    return [Question(*question) for question in islice(filter(None, questions), count)]
