"""The likelihood of targets, per row and per kind of target token."""

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

TARGET_KINDS = ("first", "content", "stop")  # kinds of target tokens: see target_kinds


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The likelihood of each row's targets, as sums: means are computed once over any set of rows.

    N = rows, K = kinds of targets (TARGET_KINDS).

        nll          (N, K) float64, negative log-likelihood in nats
        tokens       (N, K) int64, number of targets
        correct      (N,) int64, number of targets that are the most likely token
        text_bytes   (N,) int64, UTF-8 bytes of the decoded targets
    """

    nll: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray
    text_bytes: np.ndarray

    def select(self, rows: np.ndarray) -> "Likelihood":
        """Returns the likelihood of some rows; ``rows`` are indices, or a mask (N,) bool."""
        return Likelihood(self.nll[rows], self.tokens[rows], self.correct[rows], self.text_bytes[rows])

    @property
    def row_losses(self) -> np.ndarray:
        """The mean loss of each row, (N,) float64."""
        return self.nll.sum(axis=1) / self.tokens.sum(axis=1)

    def to_json(self) -> dict[str, float]:
        """Returns the metrics, including the mean loss per kind of target; only counts without targets."""
        targets, nll = int(self.tokens.sum()), float(self.nll.sum())
        if not targets:
            return {"rows": 0, "target_tokens": 0}
        both = zip(TARGET_KINDS, self.nll.sum(axis=0).tolist(), self.tokens.sum(axis=0).tolist(), strict=True)
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
    """Measures the likelihood of all targets. ``batch_size`` (rows) does not change the result."""
    stops = stop_token_ids(tokenizer)
    nll, tokens, correct, text_bytes = [], [], [], []
    for start in trange(0, len(dataset), batch_size, desc="loss", disable=None, leave=False):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        for row, (row_nll, row_correct) in zip(rows, measure_rows(model, rows), strict=True):
            kinds = target_kinds(np.array(row["labels"]), stops)
            nll.append(np.bincount(kinds, row_nll, minlength=len(TARGET_KINDS)))
            tokens.append(np.bincount(kinds, minlength=len(TARGET_KINDS)))
            correct.append(int(row_correct.sum()))
            text_bytes.append(len(_target_text(row["labels"], tokenizer).encode()))
    return Likelihood(np.array(nll), np.array(tokens), np.array(correct), np.array(text_bytes))


def measure_rows(
    model: PreTrainedModel, rows: Sequence[TokenizedExample]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns for each row the nll (n,) float32 of its targets, and whether each was predicted (n,) bool."""
    logits, targets = target_logits(model, rows)
    figures = target_nll(logits, targets), logits.argmax(dim=-1) == targets
    ends = np.cumsum([len(target_places(np.array(row["labels"]))) for row in rows])[:-1]
    parts = (np.split(figure.cpu().numpy(), ends) for figure in figures)
    return list(zip(*parts, strict=True))


@dataclass(frozen=True, eq=False)
class Guesses:
    """A model's predictions at each target of a row.

    n = targets, A = alternatives.

        nll        (n,) float32, negative log-likelihood in nats
        rank       (n,) int64, the target's rank among all tokens: 1 for the most likely
        likeliest  (n, A) int64, the most likely tokens in descending order
        shares     (n, A) float32, their probabilities
    """

    nll: np.ndarray
    rank: np.ndarray
    likeliest: np.ndarray
    shares: np.ndarray


def guess_row(model: PreTrainedModel, row: TokenizedExample, *, alternatives: int) -> Guesses:
    """Returns the model's predictions at the targets of one row."""
    logits, targets = target_logits(model, [row])
    target_logit = logits.gather(1, targets[:, None])
    rank = (logits > target_logit).sum(dim=1) + 1
    shares, likeliest = torch.softmax(logits.float(), dim=1).topk(min(alternatives, logits.shape[1]), dim=1)
    figures = (target_nll(logits, targets), rank, likeliest, shares)
    return Guesses(*(figure.cpu().numpy() for figure in figures))


@torch.no_grad()
def target_logits(
    model: PreTrainedModel, rows: Sequence[TokenizedExample]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits (N, V) that predict the N targets of the rows, and the targets (N,) int64, in order.

    The rows are separate documents of one packed row. The first token of a row is never a target.
    """
    model.eval()
    return predict_targets(model, rows)[:2]


def predict_targets(
    model: PreTrainedModel, rows: Sequence[TokenizedExample]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the same as ``target_logits``, with gradients and in the mode of the model, and the weights of
    the targets (N,) float32.

    If the rows have no targets, there may be one entry whose target is -100.
    """
    collate = DataCollatorForPackedCausalLM(with_targets=takes_targets(model))
    batch = {key: _to_device(value, model.device) for key, value in collate(rows).items()}
    labels, targets = batch.pop("labels")[0], batch.pop("shift_labels", None)
    weights = batch.pop("loss_weights", torch.ones(1, len(labels), device=labels.device))[0]
    logits = model(**batch, use_cache=False).logits[0]
    next_weights = weights.roll(-1)  # the weight of the token that each position predicts
    if targets is not None:
        return logits, targets[0], next_weights[batch["logits_to_keep"]]
    places = torch.nonzero(labels[1:] != IGNORE_INDEX)[:, 0]
    return logits[places], labels[places + 1], next_weights[places]


def target_places(labels: np.ndarray) -> np.ndarray:
    """Returns the positions of a row's targets, (n,) int64. The first token is never a target."""
    return np.flatnonzero(labels[1:] != IGNORE_INDEX) + 1


def target_starts(labels: np.ndarray) -> np.ndarray:
    """Returns which of a row's n target tokens begin a target, (n,) bool."""
    return np.diff(target_places(labels), prepend=-1) != 1


def target_kinds(labels: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    """Returns the kind of each of a row's n target tokens, (n,) int64 as an index into TARGET_KINDS.

        prompt prompt | T      T        T        <eos> | prompt | T      <eos>
                        first  content  content  stop             first  stop

    A stop token counts as ``stop`` only at the end of a target.
    """
    starts = target_starts(labels)
    ends = np.append(starts[1:], True)
    is_stop = ends & np.isin(labels[target_places(labels)], list(stop_ids))
    return np.where(is_stop, TARGET_KINDS.index("stop"), np.where(starts, 0, TARGET_KINDS.index("content")))


def _target_text(labels: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode([label for label in labels if label >= 0], skip_special_tokens=True))


def _to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
