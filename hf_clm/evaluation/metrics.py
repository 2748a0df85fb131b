"""Metrics over tokens: likelihood, accuracy, entropy."""

import math
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hf_clm.model.loss import TokenFigures
from hf_clm.schema import IGNORE_INDEX

NLL_CHUNK_TOKENS = 4096  # tokens whose logits are copied to float32 at once


@torch.no_grad()
def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the negative log-likelihood (nats) of label t+1 under logits t, (B, T - 1) float32; 0 without
    a label.

    logits (B, T, V); labels (B, T) int64.
    """
    return target_nll(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).view(len(labels), -1)


@torch.no_grad()
def target_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the negative log-likelihood (nats) of each target, (N,) float32; 0 where there is none.

    logits (N, V); targets (N,) int64. Computes in chunks, to avoid a float32 copy of all logits.
    """
    chunks = zip(logits.split(NLL_CHUNK_TOKENS), targets.split(NLL_CHUNK_TOKENS), strict=True)
    nll = [
        cross_entropy(part.float(), target, ignore_index=IGNORE_INDEX, reduction="none")
        for part, target in chunks
    ]
    return torch.cat(nll)


def logit_figures(logits: torch.Tensor, labels: torch.Tensor) -> TokenFigures:
    """Computes per-token figures from logits (B, T, V) and unshifted labels (B, T) int64."""
    targets = labels[:, 1:]
    is_target = targets != IGNORE_INDEX
    correct = (logits[:, :-1].argmax(dim=-1) == targets) & is_target
    return TokenFigures(token_nll(logits, labels), correct, is_target)


def count_tokens(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts a batch's tokens, and the pairs of tokens where one attends to the other.

    Excludes padding and documents of a single token, which EvenRows adds and which have no targets.
    """
    mask, bounds = inputs.get("attention_mask"), inputs.get("cu_seq_lens_q")
    lengths: Any = bounds.diff() if bounds is not None else mask.sum(dim=1) if mask is not None else None
    assert lengths is not None, "the batch comes from one of our collators"
    lengths = (lengths * (lengths > 1)).long()
    tokens, pairs = lengths.sum(), (lengths * (lengths + 1) // 2).sum()
    padding = inputs.get("padding_tokens", 0)
    return tokens - padding, pairs


def unigram_entropy(label_counts: np.ndarray) -> float:
    """Returns the entropy (nats per token) of the label frequencies, which is the loss of a unigram model.

    label_counts: (V,) int, how often each id is a label. Returns 0.0 if there are no labels.
    """
    counts = label_counts[label_counts > 0].astype(np.float64)
    shares = counts / max(1.0, counts.sum())
    return float(-(shares * np.log(shares)).sum())


def bits_per_byte(nll: float, text_bytes: int) -> float:
    """Converts summed nats to bits per UTF-8 byte, which is comparable between tokenizers."""
    return nll / math.log(2) / max(1, text_bytes)


def perplexity(loss: float) -> float:
    """Returns ``exp(loss)``; inf on overflow."""
    return math.exp(loss) if loss < 709 else math.inf
