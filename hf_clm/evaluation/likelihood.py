"""The likelihood of the targets of examples, row by row and by the kind of target."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import trange
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.data.batch.collators import DataCollatorForPackedCausalLM
from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.evaluation.metrics import bits_per_byte, perplexity, target_nll
from hf_clm.model.load import takes_targets
from hf_clm.schema import IGNORE_INDEX, TokenizedExample
from hf_clm.text.chat import stop_token_ids

KINDS = ("first", "content", "stop")  # of a target token, by its place: see target_kinds


@dataclass(frozen=True, eq=False)
class Likelihood:
    """What was found of each row; sums, so that any set of rows is divided once.

    N = rows, K = kinds of targets (KINDS).

        nll          (N, K) float64, nats
        tokens       (N, K) int64, targets
        correct      (N,) int64, targets that are the likeliest token
        text_bytes   (N,) int64, of the decoded targets, UTF-8
    """

    nll: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray
    text_bytes: np.ndarray

    def select(self, rows: np.ndarray) -> "Likelihood":
        """Of these rows alone; ``rows`` are numbers, or (N,) bool."""
        return Likelihood(self.nll[rows], self.tokens[rows], self.correct[rows], self.text_bytes[rows])

    @property
    def row_losses(self) -> np.ndarray:
        """(N,) float64: the mean over the targets of each row."""
        return self.nll.sum(axis=1) / self.tokens.sum(axis=1)

    def to_json(self) -> dict[str, float]:
        """The figures; of each kind of targets the mean loss. Without a row only that there is none."""
        targets, nll = int(self.tokens.sum()), float(self.nll.sum())
        if not targets:
            return {"rows": 0, "target_tokens": 0}
        both = zip(KINDS, self.nll.sum(axis=0).tolist(), self.tokens.sum(axis=0).tolist(), strict=True)
        return {
            "rows": len(self.tokens),
            "target_tokens": targets,
            "loss": nll / targets,
            "perplexity": perplexity(nll / targets),
            "bits_per_byte": bits_per_byte(nll, int(self.text_bytes.sum())),
            "token_accuracy": int(self.correct.sum()) / targets,
            **{f"loss_{kind}": total / count for kind, total, count in both if count},
        }


def measure_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dataset: TokenizedDataset,
    batch_size: int = 8,
) -> Likelihood:
    """The likelihood of every target token; ``batch_size`` (rows) changes nothing."""
    stops = stop_token_ids(tokenizer)
    nll, tokens, correct, text_bytes = [], [], [], []
    for start in trange(0, len(dataset), batch_size, desc="loss", disable=None, leave=False):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        for row, (row_nll, row_correct) in zip(rows, measure_rows(model, rows), strict=True):
            kinds = target_kinds(np.array(row["labels"]), stops)
            nll.append(np.bincount(kinds, row_nll, minlength=len(KINDS)))
            tokens.append(np.bincount(kinds, minlength=len(KINDS)))
            correct.append(int(row_correct.sum()))
            text_bytes.append(len(_target_text(row["labels"], tokenizer).encode()))
    return Likelihood(np.array(nll), np.array(tokens), np.array(correct), np.array(text_bytes))


def measure_rows(
    model: PreTrainedModel, rows: Sequence[TokenizedExample]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each row the nll (n,) float32 of its n targets, and whether each was guessed (n,) bool."""
    logits, targets = target_logits(model, rows)
    figures = target_nll(logits, targets), logits.argmax(dim=-1) == targets
    ends = np.cumsum([len(target_places(np.array(row["labels"]))) for row in rows])[:-1]
    parts = (np.split(figure.cpu().numpy(), ends) for figure in figures)
    return list(zip(*parts, strict=True))


@dataclass(frozen=True, eq=False)
class Guesses:
    """What a model expected at each target of a row.

    n = targets, A = alternatives.

        nll        (n,) float32, nats
        rank       (n,) int64, of the target among all tokens: 1 for the likeliest
        likeliest  (n, A) int64, the likeliest tokens, best first
        shares     (n, A) float32, their probabilities
    """

    nll: np.ndarray
    rank: np.ndarray
    likeliest: np.ndarray
    shares: np.ndarray


def guess_row(model: PreTrainedModel, row: TokenizedExample, *, alternatives: int) -> Guesses:
    """What the model expects at the targets of one row."""
    logits, targets = target_logits(model, [row])
    own = logits.gather(1, targets[:, None])
    rank = (logits > own).sum(dim=1) + 1
    shares, likeliest = torch.softmax(logits.float(), dim=1).topk(min(alternatives, logits.shape[1]), dim=1)
    figures = (target_nll(logits, targets), rank, likeliest, shares)
    return Guesses(*(figure.cpu().numpy() for figure in figures))


@torch.no_grad()
def target_logits(
    model: PreTrainedModel, rows: Sequence[TokenizedExample]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits (N, V) that predict the N targets of the rows, and these targets (N,) int64, in order.

    Each row is a document of its own; the first token of a row has no label.
    """
    model.eval()
    collate = DataCollatorForPackedCausalLM(with_targets=takes_targets(model))
    batch = {key: _to_device(value, model.device) for key, value in collate(rows).items()}
    labels, targets = batch.pop("labels")[0], batch.pop("shift_labels", None)
    logits = model(**batch, use_cache=False).logits[0]
    if targets is not None:
        return logits, targets[0]
    places = torch.nonzero(labels[1:] != IGNORE_INDEX)[:, 0]
    return logits[places], labels[places + 1]


def target_places(labels: np.ndarray) -> np.ndarray:
    """(n,) int64: where a row has a target; its first token never is one."""
    return np.flatnonzero(labels[1:] != IGNORE_INDEX) + 1


def target_starts(labels: np.ndarray) -> np.ndarray:
    """(n,) bool: which of the n target tokens of a row begins a target."""
    return np.diff(target_places(labels), prepend=-1) != 1


def target_kinds(labels: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    """(n,) int64: the kind of each of the n target tokens of a row, as its number in KINDS.

        prompt prompt | T      T        T        <eos> | prompt | T      <eos>
                        first  content  content  stop             first  stop

    A stop token is one only where it ends a target.
    """
    starts = target_starts(labels)
    ends = np.append(starts[1:], True)
    is_stop = ends & np.isin(labels[target_places(labels)], list(stop_ids))
    return np.where(is_stop, KINDS.index("stop"), np.where(starts, 0, KINDS.index("content")))


def _target_text(labels: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode([label for label in labels if label >= 0], skip_special_tokens=True))


def _to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
