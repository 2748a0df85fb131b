"""Generates answers to the prompts of examples, and compares them with the targets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.label.render import LabelOptions
from hf_clm.errors import EnvironmentFault
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import GREEDY, generate
from hf_clm.schema import AnyExample

Metrics = Mapping[str, Callable[[list[str], list[list[str]]], Any]]  # answers and [targets] -> .score


@dataclass(frozen=True)
class Sample:
    """A generated answer and its target. ``number``: the index of the example."""

    number: int
    prompt: str
    target: str
    text: str
    stopped: bool

    @property
    def is_exact(self) -> bool:
        """Whether the answer equals the target, including the stop token."""
        return self.stopped and self.text == self.target

    def to_json(self, places: Sequence[str]) -> dict[str, str | bool]:
        """Returns all fields as JSON; ``places`` are those of all examples (file and line)."""
        return {
            "where": places[self.number],
            "prompt": self.prompt,
            "target": self.target,
            "generated": self.text,
            "exact": self.is_exact,
            "stopped": self.stopped,
        }


@dataclass(frozen=True)
class Answers:
    """Generated answers and their metrics. ``metrics``: from ``load_metrics``, or empty."""

    samples: Sequence[Sample]
    metrics: Metrics

    def select(self, mask: np.ndarray) -> "Answers":
        """Returns the answers of some examples; ``mask`` (examples,) bool."""
        return Answers([sample for sample in self.samples if mask[sample.number]], self.metrics)

    def to_json(self) -> dict[str, Any]:
        """Returns the metrics; only ``asked``, the number of samples, if there are none."""
        count = len(self.samples)
        if not count:
            return {"asked": 0}
        texts, targets = [sample.text for sample in self.samples], [sample.target for sample in self.samples]
        return {
            "asked": count,
            "exact_match": sum(sample.is_exact for sample in self.samples) / count,
            "stopped": sum(sample.stopped for sample in self.samples) / count,
            **{name: float(metric(texts, [targets]).score) for name, metric in self.metrics.items()},
        }


def load_metrics() -> Metrics:
    """Returns chrF and BLEU over all answers, from 0 to 100. Raises EnvironmentFault without sacrebleu."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        fix = "pip install 'hf_clm[eval]'"
        raise EnvironmentFault("requires the package sacrebleu", where="--generate", fix=fix) from error
    # effective_order: answers of fewer than four words are not penalized for having no 4-grams
    return {"chrf": CHRF().corpus_score, "bleu": BLEU(effective_order=True).corpus_score}


def measure_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    examples: Sequence[AnyExample],
    metrics: Metrics,
    decoding: Decoding = GREEDY,
    rendering: LabelOptions | None = None,
) -> Answers | None:
    """Generates an answer for each example that has a prompt; returns None if no example has one.

    ``decoding`` and ``rendering``: see ``generate``.
    """
    questions = {number: pair for number, example in enumerate(examples) if (pair := example.question)}
    if not questions:
        return None
    prompts = [prompt for prompt, _ in questions.values()]
    answers = generate(
        model, tokenizer, prompts=prompts, decoding=decoding, rendering=rendering, progress="answers"
    )
    samples = [
        Sample(number, prompt.prompt_text, target, answer.text, answer.stopped)
        for (number, (prompt, target)), answer in zip(questions.items(), answers, strict=True)
    ]
    return Answers(samples, metrics)
