"""Lets a model answer the prompts of examples, and compares with their targets."""

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
    """A generated answer beside its target; ``number`` is that of the example."""

    number: int
    prompt: str
    target: str
    text: str
    stopped: bool

    @property
    def is_exact(self) -> bool:
        """Whether the answer is the target, stop token included."""
        return self.stopped and self.text == self.target

    def to_json(self, places: Sequence[str]) -> dict[str, str | bool]:
        """All of it, with the place of its example."""
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
    """How near generated answers come to their targets. ``metrics``: of ``load_metrics``, may be none."""

    samples: Sequence[Sample]
    metrics: Metrics

    def select(self, chosen: np.ndarray) -> "Answers":
        """Of these examples alone; ``chosen`` (examples,) bool."""
        return Answers([sample for sample in self.samples if chosen[sample.number]], self.metrics)

    def to_json(self) -> dict[str, Any]:
        """The figures; without a sample only that there is none."""
        asked = len(self.samples)
        if not asked:
            return {"asked": 0}
        texts, targets = [sample.text for sample in self.samples], [sample.target for sample in self.samples]
        return {
            "asked": asked,
            "exact_match": sum(sample.is_exact for sample in self.samples) / asked,
            "stopped": sum(sample.stopped for sample in self.samples) / asked,
            **{name: float(metric(texts, [targets]).score) for name, metric in self.metrics.items()},
        }


def load_metrics() -> Metrics:
    """chrF and BLEU of a whole set of answers, 0 to 100. Raises EnvironmentFault without sacrebleu."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        fix = "pip install 'hf_clm[eval]'"
        raise EnvironmentFault("needs the package sacrebleu", where="--generate", fix=fix) from error
    # answers of fewer than four words have no 4-grams: they are not held against them
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
    """Generates an answer for each example that has a prompt; None where none has.

    ``decoding`` and ``rendering``: see ``generate``.
    """
    asked = {number: question for number, example in enumerate(examples) if (question := example.question)}
    if not asked:
        return None
    prompts = [prompt for prompt, _ in asked.values()]
    found = generate(
        model, tokenizer, prompts=prompts, decoding=decoding, rendering=rendering, progress="answers"
    )
    samples = [
        Sample(number, prompt.prompt_text, target, answer.text, answer.stopped)
        for (number, (prompt, target)), answer in zip(asked.items(), found, strict=True)
    ]
    return Answers(samples, metrics)
