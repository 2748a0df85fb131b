"""Figures over tokens: likelihood, accuracy, entropy."""

import math
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hf_clm.model.loss import TokenFigures
from hf_clm.schema import IGNORE_INDEX

CHUNK_TOKENS = 4096  # of a float32 copy of the logits


@torch.no_grad()
def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, T - 1) float32: the negative log-likelihood (nats) of labels t+1 by logits t; 0 without a label.

    logits (B, T, V); labels (B, T) int64.
    """
    return target_nll(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).view(len(labels), -1)


@torch.no_grad()
def target_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(N,) float32: the negative log-likelihood (nats) of each target; 0 where there is none.

    logits (N, V); targets (N,) int64. Computed in chunks, so that no float32 copy of all logits is made.
    """
    chunks = zip(logits.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    nll = [
        cross_entropy(part.float(), target, ignore_index=IGNORE_INDEX, reduction="none")
        for part, target in chunks
    ]
    return torch.cat(nll)


def logit_figures(logits: torch.Tensor, labels: torch.Tensor) -> TokenFigures:
    """The figures of a loss that was computed from all logits (B, T, V); labels (B, T), unshifted."""
    targets = labels[:, 1:]
    is_target = targets != IGNORE_INDEX
    correct = (logits[:, :-1].argmax(dim=-1) == targets) & is_target
    return TokenFigures(token_nll(logits, labels), correct, is_target)


def count_tokens(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Real tokens, and pairs of which one attends to the other.

    Not counted are padding and the single tokens of EvenRows: a document of one token has nothing to learn.
    """
    mask, bounds = inputs.get("attention_mask"), inputs.get("cu_seq_lens_q")
    lengths: Any = bounds.diff() if bounds is not None else mask.sum(dim=1) if mask is not None else None
    assert lengths is not None, "the batch comes from one of our collators"
    lengths = (lengths * (lengths > 1)).long()
    tokens, pairs = lengths.sum(), (lengths * (lengths + 1) // 2).sum()
    padding = inputs.get("padding_tokens", 0)
    return tokens - padding, pairs


def unigram_entropy(label_counts: np.ndarray) -> float:
    """The entropy (nats per token) of the label frequencies: the loss of a model that knows only those.

    label_counts: (V,) int, how often each id is a label. 0.0 without any label.
    """
    counts = label_counts[label_counts > 0].astype(np.float64)
    shares = counts / max(1.0, counts.sum())
    return float(-(shares * np.log(shares)).sum())


def bits_per_byte(nll: float, text_bytes: int) -> float:
    """Summed nats as bits per byte of the UTF-8 text: comparable between tokenizers."""
    return nll / math.log(2) / max(1, text_bytes)


def perplexity(loss: float) -> float:
    """``exp(loss)``; inf where that is too large for a float."""
    return math.exp(loss) if loss < 709 else math.inf
