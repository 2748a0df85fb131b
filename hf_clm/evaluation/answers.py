"""Lets a model answer the prompts of examples, and compares with their targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.evaluation.evaluate import to_question
from hf_clm.generation.command import to_shown
from hf_clm.generation.generate import generate
from hf_clm.schema import Example, TokenizedExample


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


@dataclass(frozen=True)
class Answers:
    """How near generated answers come to their targets."""

    samples: Sequence[Sample]

    def select(self, chosen: np.ndarray) -> "Answers":
        """Of these examples alone; ``chosen`` (examples,) bool."""
        return Answers([sample for sample in self.samples if chosen[sample.number]])

    def to_json(self) -> dict[str, Any]:
        """The figures; without a sample only that there is none."""
        asked = len(self.samples)
        if not asked:
            return {"asked": 0}
        return {
            "asked": asked,
            "exact_match": sum(sample.is_exact for sample in self.samples) / asked,
            "stopped": sum(sample.stopped for sample in self.samples) / asked,
        }


def measure_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    examples: Sequence[Example | TokenizedExample],
    **options: Any,
) -> Answers | None:
    """Generates an answer for each example that has a prompt; None where none has.

    Args:
        options: of ``generate``.
    """
    asked = {
        number: question
        for number, example in enumerate(examples)
        if not isinstance(example, dict) and (question := to_question(example))
    }
    if not asked:
        return None
    found = generate(model, tokenizer, prompts=[prompt for prompt, _ in asked.values()], **options)
    return Answers(
        [
            Sample(number, to_shown(prompt), target, answer.text, answer.stopped)
            for (number, (prompt, target)), answer in zip(asked.items(), found, strict=True)
        ]
    )
