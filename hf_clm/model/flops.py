"""Floating-point operations of a training step, including head and attention, for computing MFU.

6 per token and weight of a matrix product: 2 for the forward pass, 2 for the gradient of the input, and 2 for
the gradient of the weight (unless it is frozen). 12 per feature and pair of tokens, one attending to the
other. Source: Kaplan et al., arXiv:2001.08361, section 2.1. Embedding lookups are not counted.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class FlopCount:
    """FLOP of a forward and backward pass: ``per_token`` in the layers, ``per_target`` in the head,
    ``per_pair`` in the attention."""

    per_token: int
    per_target: int
    per_pair: int

    def of(self, *, tokens: float, targets: float, pairs: float) -> float:
        """Returns the FLOP for the given numbers of tokens, positions where the head is computed, and pairs.

        A causal document of L tokens has L (L + 1) / 2 pairs, half of what attention without a mask computes.
        """
        return self.per_token * tokens + self.per_target * targets + self.per_pair * pairs


def count_flops(model: PreTrainedModel) -> FlopCount:
    """Counts the weights of the matrix products. In a mixture of experts, only active weights count."""
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
