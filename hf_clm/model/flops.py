"""Floating-point operations of a training step, head and attention included: what MFU is computed from.

6 for each weight of a matrix product and token: 2 forward, 2 for the gradient of the input, 2 for that of the
weight (none where it is frozen). 12 for each feature and each pair of tokens, one attending to the other.
Source: Kaplan et al., arXiv:2001.08361, section 2.1. A lookup of an embedding is none.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class FlopCount:
    """FLOP of a forward and a backward pass: ``per_token`` of the layers, ``per_target`` of the head,
    ``per_pair`` of the attention."""

    per_token: int
    per_target: int
    per_pair: int

    def of(self, *, tokens: float, targets: float, pairs: float) -> float:
        """FLOP of so many tokens, places where the head is computed, and pairs.

        A causal document of L tokens has L (L + 1) / 2 pairs: half of what a kernel without a mask computes.
        """
        return self.per_token * tokens + self.per_target * targets + self.per_pair * pairs


def count_flops(model: PreTrainedModel) -> FlopCount:
    """Counts the weights of the matrix products once. Of a mixture of experts it counts the active ones."""
    head = model.get_output_embeddings()
    layers = sum(_flops(module) for module in model.modules() if module is not head)
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    pair = 12 * config.num_hidden_layers * heads * width
    return FlopCount(layers, _flops(head) if head is not None else 0, pair)


def _flops(module: torch.nn.Module) -> int:
    if not isinstance(module, torch.nn.Linear | Conv1D):
        return 0
    return (6 if module.weight.requires_grad else 4) * module.weight.numel()
