"""The load-balancing loss of a mixture of experts, weighted in the same way as the loss of the tokens.

The models of transformers compute it once per micro-batch, and add it to a loss that is already divided by
the targets of the optimizer step: with 8 micro-batches it would count 8 times. Here it is a mean over
documents, weighted by their targets. So the sum over a step does not depend on how rows are batched, packed,
padded, accumulated or distributed over processes. Balance of single sequences: DeepSeek-V3,
arXiv:2412.19437, section 2.1.2.

The model is not changed. While a RouterLoss is ``weighing``, it replaces the function that computes the
load-balancing loss in the module of the model's class. The model multiplies the result by its coefficient and
adds it to the loss.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_clm.errors import ModelError
from hf_clm.model.load import without_adapters
from hf_clm.schema import IGNORE_INDEX

BALANCE = "load_balancing_loss_func"  # in the module of every mixture of experts in transformers
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # attributes of models


class RouterLoss:
    """The load-balancing loss of one model; ``is_used``: whether the model adds one to its loss.

    Raises ModelError if the model adds one that cannot be weighted.
    """

    def __init__(self, model: PreTrainedModel):
        inner = without_adapters(model)
        self.module: Any = sys.modules[type(inner).__module__]
        self.is_used = bool(getattr(inner.config.get_text_config(), "output_router_logits", False))
        coefficients = (getattr(inner, name) for name in COEFFICIENTS if hasattr(inner, name))
        self.coefficient = float(next(coefficients, 0.0))
        if self.is_used and not hasattr(self.module, BALANCE):
            what = "the model adds a load-balancing loss that cannot be weighted by the targets of a step"
            raise ModelError(what, where="model", fix="set output_router_logits to false in its config")
        self._stock: Any = getattr(self.module, BALANCE, None)
        self._documents = self._weights = torch.empty(0)

    @contextmanager
    def weighing(self, batch: Mapping[str, Any], items: torch.Tensor | int | None) -> Iterator[None]:
        """Makes the model weight the load-balancing loss of each document by its share of a step's targets.

        batch: from one of our collators, with ``labels`` and optionally ``loss_weights``.
        items: the number of targets of the step, or the sum of their weights; None: those of the batch.
        """
        if not self.is_used:
            yield
            return
        self._documents = number_documents(batch)
        self._weights = weigh_documents(batch, self._documents)
        self._weights /= self._weights.sum().clamp(min=1e-9) if items is None else items
        balance: Any = torch.compiler.disable(self._balance)  # the number of documents varies
        setattr(self.module, BALANCE, balance)
        try:
            yield
        finally:
            setattr(self.module, BALANCE, self._stock)

    def _balance(self, gate_logits: tuple[torch.Tensor, ...], experts: int, top_k: int, *others: Any) -> Any:
        if any(gate.shape != (len(self._documents), experts) for gate in gate_logits):
            # doge selects experts by pairs of keys: weight all tokens by the share of the micro-batch
            return self._stock(gate_logits, experts, top_k, *others) * self._weights.sum()
        balance = balance_documents(gate_logits, self._documents, count=len(self._weights), top_k=top_k)
        return (balance * self._weights).sum()


def number_documents(batch: Mapping[str, Any]) -> torch.Tensor:
    """Returns the index of each token's document, (B * T,) int64; padding comes after the last one."""
    labels, bounds, mask = batch["labels"], batch.get("cu_seq_lens_q"), batch.get("attention_mask")
    rows, width = labels.shape
    if bounds is not None:
        numbers = torch.arange(len(bounds) - 1, device=labels.device)
        return torch.repeat_interleave(numbers, bounds.diff(), output_size=width)
    numbers = torch.arange(rows, device=labels.device)[:, None].expand(rows, width)
    return (numbers if mask is None else numbers.where(mask.bool(), rows)).flatten()


def weigh_documents(batch: Mapping[str, Any], documents: torch.Tensor) -> torch.Tensor:
    """Returns the number of targets of each of D documents, or the sum of their weights, (D,) float32."""
    labels, bounds, weights = batch["labels"], batch.get("cu_seq_lens_q"), batch.get("loss_weights")
    count = len(labels) if bounds is None else len(bounds) - 1
    is_target = (labels != IGNORE_INDEX).float()
    is_target[:, 0] = 0.0  # no token precedes it
    target_weights = is_target if weights is None else is_target * weights
    return target_weights.new_zeros(count + 1).index_add_(0, documents, target_weights.flatten())[:count]


def balance_documents(
    gate_logits: tuple[torch.Tensor, ...], documents: torch.Tensor, *, count: int, top_k: int
) -> torch.Tensor:
    """Returns the load-balancing loss of each document, (count,) float32, as transformers computes it for the
    document alone.

    It is E times the sum over the E experts of the share of tokens routed to the expert times its mean
    probability, over all layers: Switch Transformer, arXiv:2101.03961, equations 4 to 6.

    Args:
        gate_logits: (N, E) for each layer, N = tokens.
        documents: (N,) int64, the index of each token's document; ``count`` for padding.
        count: the number of documents.
        top_k: experts per token.
    """
    experts = gate_logits[0].shape[1]
    # (count + 1, E): tokens routed to each expert, and its summed probability
    routed, likely = (gate_logits[0].new_zeros((count + 1, experts), dtype=torch.float32) for _ in range(2))
    for gate in gate_logits:
        shares = torch.softmax(gate.to(routed.device), dim=-1)
        top = torch.topk(shares, top_k, dim=-1).indices
        ones = torch.zeros_like(shares, dtype=torch.float32).scatter_(1, top, 1.0)
        routed = routed.index_add(0, documents, ones)
        likely = likely.index_add(0, documents, shares.float())
    tokens = torch.bincount(documents, minlength=count + 1)[:count, None] * len(gate_logits)
    tokens = tokens.clamp(min=1)  # with a static shape, some documents are empty
    return experts * (routed[:count] / tokens * (likely[:count] / tokens)).sum(dim=1)
