"""Evaluates a model on examples: likelihood of the targets, and whether it generates them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.collators import DataCollatorForPackedCausalLM
from hf_clm.data.datasets import PretrainDataset, SFTDataset
from hf_clm.evaluation.metrics import bits_per_byte, perplexity, token_counts, token_nll
from hf_clm.generation.generate import generate
from hf_clm.schema import ChatExample, Example, PromptExample, SegmentsExample


@dataclass(frozen=True)
class Likelihood:
    """Sums over all target tokens. ``nll`` in nats; ``text_bytes`` of the decoded targets, UTF-8."""

    rows: int
    target_tokens: int
    correct_tokens: int
    nll: float
    text_bytes: int

    def to_json(self) -> dict[str, float]:
        loss = self.nll / self.target_tokens
        return {
            "rows": self.rows,
            "target_tokens": self.target_tokens,
            "loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": bits_per_byte(self.nll, self.text_bytes),
            "token_accuracy": self.correct_tokens / self.target_tokens,
        }


@torch.no_grad()
def measure_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dataset: SFTDataset | PretrainDataset,
    batch_size: int = 8,
) -> Likelihood:
    """The likelihood of every target token; divided once, so ``batch_size`` (rows) changes nothing."""
    model.eval()
    collate = DataCollatorForPackedCausalLM()
    targets = correct = text_bytes = 0
    nll = 0.0
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = {key: _to_device(value, model.device) for key, value in collate(rows).items()}
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        counts = token_counts(logits, labels).tolist()
        targets, correct = targets + counts[0], correct + counts[1]
        nll += float(token_nll(logits, labels).double().sum())
        text_bytes += sum(len(_target_text(row["labels"], tokenizer).encode()) for row in rows)
    return Likelihood(len(dataset), targets, correct, nll, text_bytes)


@dataclass(frozen=True)
class Answers:
    """How many generated answers equal their targets, stop token included."""

    asked: int
    exact: int
    stopped: int

    def to_json(self) -> dict[str, float]:
        return {
            "asked": self.asked,
            "exact_match": self.exact / self.asked,
            "stopped": self.stopped / self.asked,
        }


def measure_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, examples: Sequence[Example], **options: Any
) -> Answers | None:
    """Generates an answer for each example that has a prompt; None where none has.

    Args:
        options: of ``generate``.
    """
    pairs = [pair for pair in map(to_question, examples) if pair is not None]
    if not pairs:
        return None
    answers = generate(model, tokenizer, prompts=[prompt for prompt, _ in pairs], **options)
    exact = sum(
        answer.stopped and answer.text == text for answer, (_, text) in zip(answers, pairs, strict=True)
    )
    return Answers(len(pairs), exact, sum(answer.stopped for answer in answers))


def to_question(example: Example) -> tuple[Example, str] | None:
    """The prompt and the target text of an example; None where it has no prompt or ends in no target."""
    if isinstance(example, PromptExample):
        return PromptExample(example.prompt, ""), example.completion
    if isinstance(example, ChatExample) and example.messages[-1]["role"] == "assistant":
        return ChatExample(example.messages[:-1]), example.messages[-1]["content"]
    if isinstance(example, SegmentsExample):
        ends = [number for number, segment in enumerate(example.segments) if not segment.is_target]
        read, learned = (
            (example.segments[: ends[-1] + 1], example.segments[ends[-1] + 1 :]) if ends else ([], [])
        )
        text = "".join(segment.text for segment in learned)
        return (SegmentsExample(read), text) if read and text else None
    return None


def _target_text(labels: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode([label for label in labels if label >= 0], skip_special_tokens=True))


def _to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
